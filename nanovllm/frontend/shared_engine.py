"""The engine of an LLM among threads: one of them uses it at a time, and they take turns between
two steps.

llm.py makes it, runs whole batches by it, and reaches the engine only through it.
"""

import gc
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from tqdm.auto import tqdm

from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend.batch_order import batch_order
from nanovllm.frontend.fair_lock import FairLock
from nanovllm.frontend.progress import Progress

Output = TypeVar("Output")


class SharedEngine:
    """An engine until it is closed.

    Attributes:
        owned: sequences that some call hands out itself.
    """

    def __init__(self, engine: Engine):
        self.owned: set[Sequence] = set()
        self._dropped: list[Sequence] = []  # of those, what is to be aborted
        self._engine: Engine | None = engine
        self._why_closed = "this LLM is closed"
        self._lock = FairLock()

    @contextmanager
    def use(self) -> Iterator[Engine]:
        """The engine for one thread at a time; others wait. It is closed if it can't go on after an
        error. Raises RuntimeError if it is closed."""
        with self._lock:
            if self._engine is None:
                raise RuntimeError(self._why_closed)
            if self._engine.is_stepping:
                raise RuntimeError("an LLM can't be used by what its own step calls")
            if self._dropped:
                self._abort_dropped()
            try:
                yield self._engine
            except RuntimeError as error:
                if self._engine is not None and not self._engine.executor.is_usable():
                    self._why_closed = (
                        f"this LLM is closed: its GPU failed, and can't be used any more in this "
                        f"process ({error}); start another one"
                    )
                    self.close()
                raise

    @contextmanager
    def own(self, seqs: list[Sequence]) -> Iterator[None]:
        """These are one call's. However it ends, Ctrl-C too, nothing of them stays, and others'
        requests do."""
        self.owned.update(seqs)
        try:
            yield
        finally:
            with self._lock:
                self._dropped += seqs
                # The garbage collector may drop a stream in the middle of this thread's step.
                if not self._lock.is_nested:
                    self._abort_dropped()

    def _abort_dropped(self) -> None:
        dropped = self._dropped[:]
        self.owned.difference_update(dropped)
        if self._engine is not None:
            self._engine.abort(dropped)
        del self._dropped[: len(dropped)]  # more may have come

    def run(
        self,
        make: Callable[[Engine], list[Sequence]],
        read: Callable[[Engine, list[Sequence]], Output],
        use_tqdm: bool | Callable[..., tqdm],
    ) -> list[Output]:
        """Step until the sequences that are made have ended, and read the samples of each request.
        Other threads that want a turn have it between two steps: they add their requests to the
        batch, and step as well."""
        outputs: dict[str, Output] = {}

        def take(engine: Engine, ended: Collection[Sequence]) -> None:
            for seq in ended:
                if seq.finish_reason == "error" and seq.error is None:
                    raise RuntimeError(
                        f"request {seq.request_id} was in two steps of other threads that failed; "
                        f"those have the reason"
                    )
                running.remove(seq)
                if seq.request_finished and seq.request_id not in outputs:
                    outputs[seq.request_id] = read(engine, seq.samples)
            progress.show(num_finished=len(outputs))

        with ExitStack() as stack:
            first_step = stack.enter_context(ExitStack())
            first_step.enter_context(_no_collections())
            with self.use() as engine:
                seqs = make(engine)
                stack.enter_context(self.own(seqs))
                engine.add_batch(batch_order(seqs, engine.scheduler))
            running = set(seqs)
            request_ids = dict.fromkeys(seq.request_id for seq in seqs)
            progress = stack.enter_context(Progress(len(request_ids), engine.metrics, use_tqdm))
            while running:
                with self.use() as engine:
                    take(engine, [seq for seq in running if seq.finished])  # in others' turns
                    while running:
                        ended = running.intersection(engine.step())
                        # What follows costs nothing: a GPU runs the next step meanwhile.
                        first_step.close()
                        take(engine, ended)
                        if self._lock.is_wanted or self._dropped:
                            break
        return [outputs[request_id] for request_id in request_ids]

    def close(self) -> None:
        """Free the model's and the cache's memory; a second time does nothing."""
        with self._lock:
            if self._engine is not None:
                executor = self._engine.executor
                self._engine = None
                executor.close()


@contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collections wait: a new batch sets them off, and they look at all its tokens."""
    if not gc.isenabled():  # the user's choice, or another thread will enable them
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()
