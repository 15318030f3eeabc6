"""AsyncLLM, the same engine for asyncio: requests come and go while others run.

A thread of its own steps an LLM. What asyncio's side wants of it are calls that it makes between
two steps; outputs come back by waking their consumers' event loops. It uses LLM's add_request, step
and abort.
"""

import asyncio
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

from nanovllm.core.metrics import Metric
from nanovllm.frontend import prompts
from nanovllm.frontend.requests import RequestError
from nanovllm.llm import LLM, Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


class AsyncLLM:
    """A language model for asyncio. Tasks of several event loops, in several threads, may use it.

    Args:
        model, options: as for LLM.

    Example:
        >>> async for output in llm.generate("In the beginning", SamplingParams(), "mine"):
        ...     print(output["text"])
    """

    def __init__(self, model: str, **options: Any):
        self._llm = LLM(model, **options)
        self._engine = _EngineThread(self._llm)
        # One thread: no event loop waits for a long prompt, and the tokenizer has one user.
        self._tokenizing = ThreadPoolExecutor(1, "nanovllm tokenizer")
        # By shutdown, when nobody holds it any more, or at the end of the process.
        self._finalizer = weakref.finalize(self, _shut_down, self._engine, self._tokenizing)

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt, and hand out what comes, as output_kind says; to a consumer that
        lags, several tokens at a time. To cancel the task that waits, or to leave the loop, aborts
        the request.

        Args:
            prompt, sampling_params, request_id: as for LLM.add_request.

        Raises:
            ValueError, TypeError: the prompt or a parameter won't do.
            RuntimeError: a step failed, which is the cause; or this AsyncLLM sleeps or is shut
                down.
        """
        return self._generate(partial(self._tokenize, prompt), sampling_params, request_id)

    def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same for the next message of a conversation; options are render_chat's."""
        return self._generate(partial(self._render, messages, options), sampling_params, request_id)

    async def abort(self, request_id: str | Collection[str]) -> None:
        """End a request, or some; those who wait for them get an output with the finish_reason
        "abort". One that has ended or is unknown is left alone."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)
        await self._call(self._engine.abort, ids)

    async def sleep(self, level: int = 1) -> None:
        await self._call(self._llm.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await self._call(self._llm.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return await self._call(self._llm.is_sleeping)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return await self._call(self._llm.reset_prefix_cache, reset_running_requests)

    async def get_metrics(self) -> list[Metric]:
        return await self._call(self._llm.get_metrics)

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def shutdown(self) -> None:
        """Free the memory, after the step that runs. Who waits for a request gets a RuntimeError,
        as all later calls do."""
        self._finalizer()

    async def _generate(
        self,
        tokenize: Callable[[str | None], Prompt],
        sampling_params: SamplingParams | None,
        request_id: str | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        loop = asyncio.get_running_loop()
        request = _Request(request_id, sampling_params, loop)
        self._engine.check_runs()
        prompt = await loop.run_in_executor(self._tokenizing, tokenize, request_id)
        try:
            await self._call(self._engine.add, request, prompt)
            while not request.is_over:
                yield await request.next_output()
        finally:
            if not request.is_over:
                self._engine.post(self._engine.drop, request)

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.wrap_future(self._engine.post(function, *args))

    def _tokenize(self, prompt: Prompt, request_id: str | None) -> Prompt:
        """Token ids, which are quickly added; what is no prompt is left to add_request."""
        if not prompts.is_single(prompt):
            return prompt
        llm = self._llm
        [tokenized] = prompts.normalize(
            prompt,
            llm._checkpoint.tokenizer,
            llm.model_config.vocab_size,
            llm.max_model_len,
            request_id,
        )
        return {"prompt": tokenized.text, "prompt_token_ids": tokenized.token_ids}

    def _render(self, messages: list[Message], options: dict[str, Any], _: str | None) -> Prompt:
        [prompt] = self._llm.render_chat([messages], **options)
        return prompt


class _Request:
    """One request and who waits for it: a place for one output, in which a later one joins the one
    that nobody has taken yet."""

    def __init__(
        self, request_id: str | None, params: SamplingParams | None, loop: asyncio.AbstractEventLoop
    ):
        self.id, self.params, self.loop = request_id, params, loop
        self.is_over = False  # the last output was taken, or an error
        self.has_news = asyncio.Event()
        self.lock = threading.Lock()  # of what follows, which both threads change
        self.output: RequestOutput | None = None
        self.error: BaseException | None = None

    @property
    def is_delta(self) -> bool:
        return self.params is not None and self.params.output_kind is RequestOutputKind.DELTA

    def put(self, output: RequestOutput) -> bool:
        """From the engine's thread. Returns whether the consumer is still to be woken, or can't
        be."""
        with self.lock:
            if self.output is None:
                self.output = output
                return True
            self.output.add(output, aggregate=self.is_delta)
            return self.loop.is_closed()

    async def next_output(self) -> RequestOutput:
        while True:
            with self.lock:
                output, self.output = self.output, None
                if output is not None:
                    self.is_over = output.finished
                    return output
                if self.error is not None:
                    self.is_over = True
                    if isinstance(self.error, RequestError):  # its own
                        raise self.error
                    raise RuntimeError(
                        f"request {self.id!r} ended with an error of the engine: {self.error}"
                    ) from self.error
                self.has_news.clear()
            await self.has_news.wait()


class _EngineThread:
    """Makes the calls that it is asked for and steps the LLM while there are requests."""

    def __init__(self, llm: LLM):
        self.llm = llm
        self.requests: dict[str, _Request] = {}
        self.calls: deque[tuple[Future, Callable[..., Any], tuple]] = deque()
        self.has_calls = threading.Event()
        self.is_stopped = False
        self.thread = threading.Thread(target=self._run, name="nanovllm engine", daemon=True)
        self.thread.start()

    # From any thread

    def check_runs(self) -> None:
        if self.is_stopped:
            raise RuntimeError("this AsyncLLM is shut down")

    def post(self, function: Callable[..., Any], *args: Any) -> Future:
        """Have a call made between two steps."""
        future: Future = Future()
        self.calls.append((future, function, args))
        self.has_calls.set()
        if self.is_stopped:
            self._make_calls()  # which say so
        return future

    def stop(self) -> None:
        self.post(self._stop)
        if threading.current_thread() is not self.thread:
            self.thread.join()

    # In its own

    def _run(self) -> None:
        while not self.is_stopped:
            if not self.requests:
                self.has_calls.wait()
            self.has_calls.clear()
            self._make_calls()
            if self.requests:
                self._step()

    def _make_calls(self) -> None:
        while True:
            try:
                future, function, args = self.calls.popleft()
            except IndexError:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                self.check_runs()
                result = function(*args)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

    def _step(self) -> None:
        try:
            self._deliver(self.llm.step())
        except RequestError as error:
            self._fail(error, [error.request_id])
        except BaseException as error:  # whatever it is, they must not wait for ever
            self._fail(error, list(self.requests))

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        news = []
        for output in outputs:
            request = self.requests.get(output.request_id)
            if request is not None and request.put(output):
                news.append(request)
            if output.finished:
                self.requests.pop(output.request_id, None)
        self._wake(news)

    def _wake(self, requests: list[_Request]) -> None:
        loops = defaultdict(list)
        for request in requests:
            loops[request.loop].append(request)
        for loop, its in loops.items():
            try:
                loop.call_soon_threadsafe(_set_all, [request.has_news for request in its])
            except RuntimeError:  # the loop is closed, nobody waits
                for request in its:
                    self.drop(request)

    def _fail(self, error: BaseException, request_ids: list[str]) -> None:
        """These don't go on."""
        failed = []
        for request_id in request_ids:
            with suppress(RuntimeError):  # the LLM may be closed
                self.llm.abort(request_id)
            if request := self.requests.pop(request_id, None):
                request.error = error
                failed.append(request)
        self._wake(failed)

    def _stop(self) -> None:
        self.is_stopped = True
        self._fail(RuntimeError("this AsyncLLM is shut down"), list(self.requests))
        self.llm.close()

    def add(self, request: _Request, prompt: Prompt) -> None:
        request.id = self.llm.add_request(prompt, request.params, request.id)
        self.requests[request.id] = request

    def drop(self, request: _Request) -> None:
        """Its consumer is gone."""
        if request.id is not None and self.requests.get(request.id) is request:
            del self.requests[request.id]
            self.llm.abort(request.id)

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            with self.llm._use_engine() as engine:
                if request_id not in engine.unfinished or request_id not in self.requests:
                    continue
                live = list(engine.unfinished[request_id])
                is_delta = self.requests[request_id].is_delta
                samples = live[0].samples
                if is_delta:  # those that have news
                    samples = [seq for seq in samples if seq in live or seq in engine.advanced]
                engine.abort(live[0].samples)
                output = self.llm._requests.output(engine, samples, delta=is_delta)
            self._deliver([output])


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _shut_down(engine: _EngineThread, tokenizing: ThreadPoolExecutor) -> None:
    tokenizing.shutdown(wait=False)
    engine.stop()
