"""AsyncLLM, the same engine for asyncio: requests come and go while others run.

It is one client of an LLM's engine: a task awaits what the engine's thread does for it, and outputs
come back by waking their consumers' event loops.
"""

import asyncio
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from nanovllm.config import options_of
from nanovllm.core.metrics import Metric
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.thread import EngineThread
from nanovllm.frontend.clients import Stream
from nanovllm.frontend.requests import Requests
from nanovllm.llm import LLM, Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

PAUSE_MODES = ("abort", "wait", "keep")


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
        self._thread = self._llm._thread
        self._client = _Client(self._llm._requests, self._thread)
        self.model_config = self._llm.model_config
        # By shutdown, when the last reference is gone, or at the end of the process.
        self._finalizer = weakref.finalize(self, self._thread.close, "this AsyncLLM is shut down")

    @classmethod
    def from_engine_args(
        cls,
        engine_args: Any,
        start_engine_loop: bool = True,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
    ) -> "AsyncLLM":
        """From an AsyncEngineArgs, ours or vLLM's, or any object whose attributes are options. The
        other arguments are vLLM's and have no effect; but for stat_loggers, which is a ValueError.
        """
        return cls(**options_of(engine_args, stat_loggers))

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        prompt_text: str | None = None,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        data_parallel_rank: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt, and hand out what comes, as output_kind says; to a consumer that
        lags, several tokens at a time. To cancel the task that waits, or to leave the loop, aborts
        the request. A request that an error of its own ends has the finish_reason "error".

        Args:
            prompt, sampling_params, request_id, priority, lora_request, tokenization_kwargs: as for
                LLM.add_request.
            prompt_text: the output's `prompt`, where `prompt` is token ids.
            trace_headers, data_parallel_rank: vLLM's, no effect.

        Raises:
            ValueError, TypeError: the prompt or a parameter won't do; at the first output.
            RuntimeError: a step failed, which is the cause; or this AsyncLLM sleeps or is shut
                down.
        """
        if prompt_text is not None and isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt, "prompt": prompt_text}

        def make() -> list[Sequence]:
            self._llm._refuse(lora_request, priority)
            return self._llm._make_one(
                prompt, sampling_params, request_id, priority, tokenization_kwargs
            )

        return self._generate(make, request_id)

    def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same for the next message of a conversation; options are render_chat's."""

        def make() -> list[Sequence]:
            [prompt] = self._llm.render_chat([messages], **options)
            return self._llm._make_one(prompt, sampling_params, request_id)

        return self._generate(make, request_id)

    async def abort(self, request_id: str | Collection[str]) -> None:
        """End a request, or some; their consumers get an output with the finish_reason "abort". A
        request that has ended or is unknown is left alone."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)

        client, thread = self._client, self._thread

        def abort(_: Engine) -> None:
            for one in client.consumers.keys() & ids:
                thread.abort(one)

        await self._call(abort)

    async def pause_generation(
        self,
        *,
        mode: str = "abort",
        wait_for_inflight_requests: bool | None = None,
        clear_cache: bool = True,
    ) -> None:
        """Run no request until resume_generation, for example to change weights; requests that come
        meanwhile wait.

        Args:
            mode: "abort" ends running requests, with the finish_reason "abort"; "wait" lets them
                end; "keep" has them go on after resume_generation.
            wait_for_inflight_requests: True: an older name of mode="wait".
            clear_cache: forget the prefix cache; requests that were kept compute their tokens
                again.

        Raises:
            ValueError: another mode.
        """
        if mode not in PAUSE_MODES:
            raise ValueError(f"mode must be 'abort', 'wait' or 'keep', got {mode!r}")
        client, idle = self._client, Future()  # type: _Client, Future[None]
        waits = mode == "wait" or wait_for_inflight_requests
        await self._call(lambda _: client.hold_back(idle))
        if waits:
            await asyncio.wrap_future(idle)
        ends = mode == "abort" and not waits
        await self._call(lambda engine: client.pause(engine, ends, clear_cache))

    async def resume_generation(self) -> None:
        """End the pause."""
        client = self._client
        await self._call(lambda _: client.resume())

    async def is_paused(self) -> bool:
        return self._client.is_paused

    async def sleep(self, level: int = 1) -> None:
        await asyncio.to_thread(self._llm.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await asyncio.to_thread(self._llm.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return await asyncio.to_thread(self._llm.is_sleeping)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return await asyncio.to_thread(self._llm.reset_prefix_cache, reset_running_requests)

    async def start_profile(self, profile_prefix: str | None = None) -> None:
        await asyncio.to_thread(self._llm.start_profile, profile_prefix)

    async def stop_profile(self) -> None:
        await asyncio.to_thread(self._llm.stop_profile)

    async def do_log_stats(self) -> None:
        await asyncio.to_thread(self._llm.do_log_stats)

    async def get_metrics(self) -> list[Metric]:
        return await asyncio.to_thread(self._llm.get_metrics)

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None."""
        return self._llm._checkpoint.tokenizer

    async def check_health(self) -> None:
        """Raises RuntimeError if no request can run any more; it says why."""
        if self.errored:
            raise self.dead_error

    @property
    def is_running(self) -> bool:
        return not self.errored

    @property
    def errored(self) -> bool:
        """Whether the engine is gone: by shutdown, or by an error that it could not survive."""
        return self._thread.is_closing or self._thread.is_closed

    is_stopped = errored

    @property
    def dead_error(self) -> RuntimeError:
        return RuntimeError(self._thread.why_closed)

    def shutdown(self, timeout: float | None = None) -> None:
        """Free the memory, after the step that runs. Consumers get a RuntimeError, as all later
        calls do. There is no timeout: a step ends by itself."""
        self._finalizer()
        for *_, queued in self._client.held:
            _resolve(queued, None, self.dead_error)

    async def _call(self, function: Callable[[Engine], Any]) -> Any:
        """Have function(engine) called between two rounds."""
        return await asyncio.to_thread(self._thread.call, function)

    async def _generate(
        self, make: Callable[[], list[Sequence]], request_id: str | None
    ) -> AsyncGenerator[RequestOutput, None]:
        client, thread, loop = self._client, self._thread, asyncio.get_running_loop()
        await self.check_health()
        # No event loop waits for a long prompt or for a grammar.
        seqs = await asyncio.to_thread(make)
        consumer, queued = _Consumer(loop, seqs), Future()  # type: _Consumer, Future[None]
        try:
            thread.post(
                lambda _: client.add(consumer, request_id is not None, queued),
                partial(_refuse, queued),
            )
            await asyncio.wrap_future(queued)
            while True:
                output = await consumer.next_output()
                client.untaken.discard(output.request_id)
                yield output
                if output.finished:
                    return
        finally:
            thread.post(lambda _: client.drop(consumer), starts=False)


AsyncLLMEngine = AsyncLLM  # vLLM's older name


class _Consumer:
    """The task that iterates over one request's outputs."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seqs: list[Sequence]):
        self.loop, self.seqs = loop, seqs
        self.has_news = asyncio.Event()
        self.outputs: deque[RequestOutput] = deque()
        self.error: BaseException | None = None

    async def next_output(self) -> RequestOutput:
        while not self.outputs:
            if self.error is not None:
                raise RuntimeError(
                    f"request {self.seqs[0].request_id!r} ended with an error of the engine: "
                    f"{self.error}"
                ) from self.error
            self.has_news.clear()
            await self.has_news.wait()
        return self.outputs.popleft()


class _Client(Stream):
    """All requests of an AsyncLLM. Its methods run in the engine's thread.

    Attributes:
        held: requests that came during a pause.
        idle: futures that wait until no request is unfinished.
    """

    def __init__(self, requests: Requests, thread: EngineThread):
        super().__init__(requests, self._hand_on)
        self.thread = thread
        self.consumers: dict[str, _Consumer] = {}
        self.is_paused = False
        self.held: list[tuple[_Consumer, bool, Future[None]]] = []
        self.idle: list[Future[None]] = []

    def hold_back(self, idle: "Future[None]") -> None:
        """Begin a pause, for requests that come."""
        self.is_paused = True
        self.idle.append(idle)
        self._note_idle()

    def pause(self, engine: Engine, ends: bool, clear_cache: bool) -> None:
        """Run no step more, and end the requests or keep them; unless the pause has ended while it
        waited."""
        if not self.is_paused:
            return
        for request_id in list(self.consumers) if ends else ():
            self.thread.abort(request_id)
        self.drives = False
        self.thread.driving.pop(self, None)
        if clear_cache:
            engine.reset_prefix_cache(reset_running_requests=True)

    def resume(self) -> None:
        self.is_paused, self.drives = False, True
        if self.seqs:
            self.thread.driving[self] = None
        held, self.held = self.held, []
        for request in held:
            self.add(*request)

    def _note_idle(self) -> None:
        while self.idle and not self.seqs:
            _resolve(self.idle.pop(), None, None)

    def add(self, consumer: _Consumer, own_id: bool, queued: "Future[None]") -> None:
        if self.is_paused:
            self.held.append((consumer, own_id, queued))
        elif queued.set_running_or_notify_cancel():  # else its task has been cancelled
            try:
                self.thread.add(self, consumer.seqs, own_id)
            except Exception as error:
                queued.set_exception(error)
            else:
                self.consumers[consumer.seqs[0].request_id] = consumer
                queued.set_result(None)

    def drop(self, consumer: _Consumer) -> None:
        self.thread.drop(self, consumer.seqs)
        request_id = consumer.seqs[0].request_id
        if self.consumers.get(request_id) is consumer:
            del self.consumers[request_id]
            self.untaken.discard(request_id)
        self._note_idle()

    def advance(self, seqs: list[Sequence]) -> None:
        super().advance(seqs)
        for request_id in {seq.request_id for seq in self.news}:  # not taken for a step
            if self.consumers[request_id].loop.is_closed():
                self.drop(self.consumers[request_id])
        self._note_idle()

    def _hand_on(self, news: list[RequestOutput] | BaseException) -> None:
        if isinstance(news, BaseException):
            woken, self.consumers = list(self.consumers.values()), {}
            self.untaken.clear()
            for consumer in woken:
                consumer.error = news
            while self.idle:
                _resolve(self.idle.pop(), None, None)
        else:
            woken = [self.consumers[output.request_id] for output in news]
            for consumer, output in zip(woken, news, strict=True):
                consumer.outputs.append(output)
                if output.finished:  # the id may be used again before the consumer takes it
                    del self.consumers[output.request_id]
                    self.untaken.discard(output.request_id)
        by_loop = defaultdict(list)
        for consumer in woken:
            by_loop[consumer.loop].append(consumer.has_news)
        for loop, events in by_loop.items():
            with suppress(RuntimeError):  # the loop is closed: `advance` will see that
                loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def _refuse(future: Future, _: Any, error: BaseException | None) -> None:
    if error is not None:
        _resolve(future, None, error)


def _resolve(future: Future, result: Any, error: BaseException | None) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result) if error is None else future.set_exception(error)
