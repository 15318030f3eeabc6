"""Callers of the engine's thread, and what each gets of its requests: a whole batch at its end, a
stream as it is read, or what a step by hand has brought. llm.py and async_llm.py make them."""

import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from nanovllm.engine.sequence import Sequence
from nanovllm.engine.thread import Client, take
from nanovllm.frontend.requests import Requests
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import RequestOutputKind

Output = TypeVar("Output")

DELTA = RequestOutputKind.DELTA
SECONDS_SHOWN = 0.1  # between two looks at a progress bar


class Wait:
    """How a caller sleeps until its requests have ended. While a step runs, each of its wake-ups
    takes the interpreter's lock from the engine's thread, so they are few.

    Args:
        shows: whether the caller looks at the progress meanwhile.
    """

    def __init__(self, shows: bool):
        self.shows, self.shown = shows, time.monotonic()
        self.num_done = 0
        self.is_over, self.error = False, None  # type: bool, BaseException | None
        self.outbox: SimpleQueue[None] = SimpleQueue()

    def until_over(self, show: Callable[[int], object] | None) -> None:
        """Raises what has ended the wait early."""
        while not self.is_over:
            take(self.outbox)
            if show is not None and not self.is_over:
                show(self.num_done)
        if show is not None:
            show(self.num_done)
        if self.error is not None:
            raise self.error

    # In the engine's thread

    def answer(self, _: Any, error: BaseException | None) -> None:
        """The requests were queued, or not because of the error."""
        if error is not None:
            self.end(error)

    def progress(self, num_done: int) -> None:
        self.num_done = num_done
        if self.shows and (now := time.monotonic()) - self.shown >= SECONDS_SHOWN:
            self.shown = now
            self.outbox.put(None)

    def end(self, error: BaseException | None = None) -> None:
        if not self.is_over:
            self.error, self.is_over = error, True
            self.outbox.put(None)


class Batch(Client, Generic[Output]):
    """Requests that one call runs to their ends.

    Args:
        read: makes a request's output of its samples.
        shows: as of Wait.
        on_step: called after the first step.
    """

    wants_tokens = False

    def __init__(
        self,
        seqs: list[Sequence],
        read: Callable[[list[Sequence]], Output],
        shows: bool,
        on_step: Callable[[], object],
    ):
        super().__init__()
        self.requests = [seq for seq in seqs if seq.index == 0]
        self.outputs: dict[Sequence, Output] = {}
        self.read, self.on_step = read, on_step
        self.wait = Wait(shows)
        self.wait.is_over = not seqs

    def advance(self, seqs: list[Sequence]) -> None:
        self.on_step()
        self.on_step = lambda: None
        for seq in seqs:
            first = seq.samples[0]
            if seq.request_finished and first not in self.outputs:
                self.outputs[first] = self.read(seq.samples)
        self.wait.progress(len(self.outputs))
        if not self.seqs:
            self.wait.end()

    def fail(self, error: BaseException) -> None:
        self.wait.end(error)


class Stream(Client):
    """Requests whose outputs are handed on as the caller takes them. One output of a request waits
    at most, and its last one: what comes meanwhile joins the next.

    Args:
        requests: makes the outputs.
        put: takes outputs, or the error that ends all, in the engine's thread.

    Attributes:
        untaken: the requests whose last output the caller has not taken yet; it removes them.
    """

    def __init__(
        self,
        requests: Requests,
        put: Callable[[list[RequestOutput] | BaseException], object],
    ):
        super().__init__()
        self.requests, self.put = requests, put
        self.untaken: set[str] = set()

    def advance(self, seqs: list[Sequence]) -> None:
        self.news.update(dict.fromkeys(seqs))
        due = [
            seq for seq in self.news if seq.request_id not in self.untaken or seq.request_finished
        ]
        for seq in due:
            del self.news[seq]
        if outputs := self.requests.news(due):
            self.untaken.update(output.request_id for output in outputs if not output.finished)
            self.put(outputs)

    def fail(self, error: BaseException) -> None:
        self.put(error)


class ByHand(Client):
    """Requests of add_request and enqueue: they run when a caller says step or waits for their
    completion, and beside the requests of others.

    Attributes:
        kept: what an interrupt has kept a step from returning.
        completed: by request, what wait_for_completion returns; None: it is not finished, or a step
            has returned it.
        waits: of the callers that wait for completion.
    """

    drives = False

    def __init__(self, requests: Requests):
        super().__init__()
        self.requests = requests
        self.kept: list[RequestOutput] = []
        self.completed: dict[str, RequestOutput | None] = {}
        self.waits: dict[Wait, None] = {}

    def advance(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            self.news[seq] = None
            if seq.finish_reason == "abort":
                for sample in seq.samples:
                    self.news.pop(sample, None)
        if self.waits:
            finished = {out.request_id: out for out in self.take() if out.finished}
            self.completed.update(finished)
            num_done = sum(output is not None for output in self.completed.values())
            for wait in self.waits:
                wait.progress(num_done)
                if not self.seqs:
                    wait.end()

    def fail(self, error: BaseException) -> None:
        for wait in self.waits:
            wait.end(error)

    def holds(self, request_id: str) -> bool:
        return (
            self.completed.get(request_id) is not None
            or any(seq.request_id == request_id for seq in self.news)
            or any(output.request_id == request_id for output in self.kept)
        )

    def after_fork(self) -> None:
        self.requests.after_fork()
        self.waits = {}

    def take(self) -> list[RequestOutput]:
        """All that is new."""
        outputs = {output.request_id: output for output in self.kept}
        is_delta = {seq.request_id: seq.params.output_kind is DELTA for seq in self.news}
        made = self.requests.news(self.news)
        self.news, self.kept = {}, []
        for new in made:
            if new.request_id in outputs:
                outputs[new.request_id].add(new, is_delta[new.request_id])
            else:
                outputs[new.request_id] = new
        return list(outputs.values())

    def take_completed(self, _: Any) -> dict[str, RequestOutput | None]:
        completed, self.completed = self.completed, {}
        return completed

    def put_back(self, outputs: list[RequestOutput]) -> None:
        """What take has given did not reach the caller."""
        self.kept = outputs
