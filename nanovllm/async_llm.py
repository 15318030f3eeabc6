"""AsyncLLM, the same engine for asyncio: requests come and go while others run.

It is one client of an LLM's engine: a task awaits what the engine's thread does for it, and outputs
come back by waking their consumers' event loops.
"""

import asyncio
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Collection
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any

from nanovllm.core.metrics import Metric
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.thread import EngineThread
from nanovllm.frontend.clients import Stream
from nanovllm.frontend.requests import Requests
from nanovllm.llm import LLM, Message, Prompt
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams


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
        # By shutdown, when the last reference is gone, or at the end of the process.
        self._finalizer = weakref.finalize(self, self._thread.close, "this AsyncLLM is shut down")

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generate for one prompt, and hand out what comes, as output_kind says; to a consumer that
        lags, several tokens at a time. To cancel the task that waits, or to leave the loop, aborts
        the request. A request that an error of its own ends has the finish_reason "error".

        Args:
            prompt, sampling_params, request_id, priority: as for LLM.add_request.

        Raises:
            ValueError, TypeError: the prompt or a parameter won't do.
            RuntimeError: a step failed, which is the cause; or this AsyncLLM sleeps or is shut
                down.
        """
        return self._generate(lambda: prompt, sampling_params, request_id, priority)

    def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **options: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The same for the next message of a conversation; options are render_chat's."""

        def render() -> Prompt:
            [prompt] = self._llm.render_chat([messages], **options)
            return prompt

        return self._generate(render, sampling_params, request_id, 0)

    async def abort(self, request_id: str | Collection[str]) -> None:
        """End a request, or some; their consumers get an output with the finish_reason "abort". A
        request that has ended or is unknown is left alone."""
        ids = [request_id] if isinstance(request_id, str) else list(request_id)

        client, thread = self._client, self._thread

        def abort(_: Engine) -> None:
            for one in client.consumers.keys() & ids:
                thread.abort(one)

        await asyncio.to_thread(thread.call, abort)

    async def sleep(self, level: int = 1) -> None:
        await asyncio.to_thread(self._llm.sleep, level)

    async def wake_up(self, tags: list[str] | None = None) -> None:
        await asyncio.to_thread(self._llm.wake_up, tags)

    async def is_sleeping(self) -> bool:
        return await asyncio.to_thread(self._llm.is_sleeping)

    async def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        return await asyncio.to_thread(self._llm.reset_prefix_cache, reset_running_requests)

    async def get_metrics(self) -> list[Metric]:
        return await asyncio.to_thread(self._llm.get_metrics)

    def get_tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def shutdown(self) -> None:
        """Free the memory, after the step that runs. Consumers get a RuntimeError, as all later
        calls do."""
        self._finalizer()

    async def _generate(
        self,
        make_prompt: Callable[[], Prompt],
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> AsyncGenerator[RequestOutput, None]:
        client, thread, loop = self._client, self._thread, asyncio.get_running_loop()
        if thread.is_closing:
            raise RuntimeError(thread.why_closed)
        # No event loop waits for a long prompt or for a grammar.
        seqs = await asyncio.to_thread(
            self._make, make_prompt, sampling_params, request_id, priority
        )
        consumer, queued = _Consumer(loop, seqs), Future()  # type: _Consumer, Future[None]
        try:
            thread.post(
                lambda _: client.add(consumer, own_id=request_id is not None),
                partial(_resolve, queued),
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

    def _make(
        self,
        make_prompt: Callable[[], Prompt],
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int,
    ) -> list[Sequence]:
        self._llm._refuse(priority=priority)
        return self._llm._make_one(make_prompt(), sampling_params, request_id, priority)


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
    """All requests of an AsyncLLM. Its methods run in the engine's thread."""

    def __init__(self, requests: Requests, thread: EngineThread):
        super().__init__(requests, self._hand_on)
        self.thread = thread
        self.consumers: dict[str, _Consumer] = {}

    def add(self, consumer: _Consumer, own_id: bool) -> None:
        self.thread.add(self, consumer.seqs, own_id)
        self.consumers[consumer.seqs[0].request_id] = consumer

    def drop(self, consumer: _Consumer) -> None:
        self.thread.drop(self, consumer.seqs)
        request_id = consumer.seqs[0].request_id
        if self.consumers.get(request_id) is consumer:
            del self.consumers[request_id]
            self.untaken.discard(request_id)

    def advance(self, seqs: list[Sequence]) -> None:
        super().advance(seqs)
        for request_id in {seq.request_id for seq in self.news}:  # not taken for a step
            if self.consumers[request_id].loop.is_closed():
                self.drop(self.consumers[request_id])

    def _hand_on(self, news: list[RequestOutput] | BaseException) -> None:
        if isinstance(news, BaseException):
            woken, self.consumers = list(self.consumers.values()), {}
            self.untaken.clear()
            for consumer in woken:
                consumer.error = news
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


def _resolve(future: Future, result: Any, error: BaseException | None) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result) if error is None else future.set_exception(error)
