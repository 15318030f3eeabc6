"""The engine: requests come in, steps go to the worker, sampled tokens come back and end sequences.

llm.py drives it; what runs in a step is the scheduler's choice, how it runs the executor's.
"""

import time
from collections import deque

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.metrics import EngineMetrics
from nanovllm.step import Executor, PendingStep, StepOutput


class Engine:
    """Continuous batching over an executor.

    Args:
        executor: runs the steps, in order.
        num_blocks: pages of the KV cache; enough for the longest sequence that is ever added.
        block_size: tokens a page.
        max_num_seqs: sequences resident at a time.
        max_num_batched_tokens: query tokens a step.
        enable_prefix_caching: whether sequences share the pages of equal prefixes.
        depth: steps in flight. 1 waits for each; with 2 the next step is scheduled while one runs.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        depth: int = 1,
    ):
        self.executor = executor
        self.depth = depth
        self.metrics = EngineMetrics()
        self.scheduler = Scheduler(
            BlockManager(num_blocks, block_size, enable_prefix_caching),
            max_num_seqs,
            max_num_batched_tokens,
            self.metrics,
        )
        self.pending: deque[tuple[ScheduledStep, PendingStep]] = deque()
        self.unfinished: dict[str, Sequence] = {}
        self.recovered: list[Sequence] = []  # ended in a step whose result was lost

    @property
    def has_unfinished(self) -> bool:
        return bool(self.unfinished or self.pending or self.recovered)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Its request id must be new, and it must fit in the cache alone."""
        assert seq.request_id not in self.unfinished
        self.unfinished[seq.request_id] = seq
        self.scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """End a request where it is; an unknown or ended one is left alone. Steps in flight may
        still compute its tokens; they are thrown away."""
        seq = self.unfinished.pop(request_id, None)
        if seq is not None:
            seq.finish_reason = "abort"
            self.scheduler.finish([seq])

    def step(self) -> list[Sequence]:
        """One round: submit a step if one can run, and read the oldest one when `depth` are in
        flight or none could be submitted.

        Returns the sequences that got a token; those that ended have a finish_reason. May be empty.

        Raises what the executor raises. Unfinished requests then start over from their known tokens
        at the next call.
        """
        recovered, self.recovered = self.recovered, []
        try:
            scheduled = self.scheduler.schedule(can_preempt=not self.pending)
            if scheduled:
                self.pending.append((scheduled, self.executor.submit(scheduled.input)))
            assert self.pending or not self.unfinished, "unfinished requests, and none can run"
            if self.pending and (not scheduled or len(self.pending) == self.depth):
                step, handle = self.pending.popleft()
                return recovered + self._process(step, handle.result())
            return recovered
        except BaseException:  # Ctrl-C too: it may come at any line
            self._recover(recovered)
            raise

    def _recover(self, recovered: list[Sequence]) -> None:
        """After an exception: keep what the sequences know, and compute all of it again."""
        self.pending.clear()
        for seq in self.unfinished.values():
            if seq.output_token_ids:
                seq.check_stop()  # the exception may have come between a token and its check
        self.recovered = recovered + [s for s in self.unfinished.values() if s.finished]
        self.unfinished = {s.request_id: s for s in self.unfinished.values() if not s.finished}
        self.scheduler.restart(list(self.unfinished.values()))

    def _process(self, step: ScheduledStep, output: StepOutput) -> list[Sequence]:
        now = time.monotonic()
        advanced: list[Sequence] = []
        finished: list[Sequence] = []
        for seq, token_id in zip(step.sampled, output.token_ids, strict=True):
            if seq.finished:
                continue  # ended while this step was in flight: it ran past its end
            seq.num_pending -= 1
            seq.token_ids.append(token_id)
            seq.check_stop()
            self.scheduler.block_manager.register(seq)
            advanced.append(seq)
            if seq.metrics.first_token_time is None:
                seq.metrics.first_token_time = now
            if seq.finished:
                seq.metrics.finished_time = now
                finished.append(seq)
        if finished:
            self.scheduler.finish(finished)
            for seq in finished:
                del self.unfinished[seq.request_id]
        return advanced
