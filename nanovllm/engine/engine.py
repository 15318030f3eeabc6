"""The engine: requests come in, steps go to the worker, sampled tokens come back and end sequences.

llm.py drives it; what runs in a step is the scheduler's choice, how it runs the executor's.
"""

import time
from collections import deque
from collections.abc import Collection
from itertools import chain

from nanovllm.core.metrics import EngineMetrics
from nanovllm.core.step import Executor, PendingStep, StepOutput
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.policy import Policy
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import LogprobLines


class Engine:
    """Continuous batching over an executor.

    Args:
        executor: runs the steps, in order; its cache is large enough for the longest sequence that
            is ever added.
        max_num_seqs: sequences resident at a time.
        max_num_batched_tokens: query tokens a step.
        enable_prefix_caching: whether sequences share the blocks of equal prefixes.
        policy: which sequence is admitted next, and which is preempted; None: first come, first
            served.
        depth: steps in flight. 1 waits for each; with 2 the next step is scheduled while one runs.
        detokenizer: finds stop strings; None: no sequence has any.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        policy: Policy | None = None,
        depth: int = 1,
        detokenizer: Detokenizer | None = None,
    ):
        self.executor = executor
        self.depth = depth
        self.detokenizer = detokenizer
        self.metrics = EngineMetrics()
        self.scheduler = Scheduler(
            executor, max_num_seqs, max_num_batched_tokens, enable_prefix_caching, policy
        )
        self.pending: deque[tuple[ScheduledStep, PendingStep]] = deque()
        # Request id -> its samples, in order.
        self.unfinished: dict[str, dict[Sequence, None]] = {}
        # Sequences with new tokens; who hands them on takes them out. An interrupt loses none.
        self.advanced: dict[Sequence, None] = {}
        # Set while scheduler and pages change; found set later, an exception came in between.
        self.dirty = False
        self.is_stepping = False  # the worker may call the user's code meanwhile

    @property
    def has_unfinished(self) -> bool:
        return bool(self.unfinished or self.pending or self.advanced)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Its request id must be new, or that of its other samples, which were
        added just before; and it must fit in the cache alone."""
        assert seq.siblings or seq.request_id not in self.unfinished
        dirty, self.dirty = self.dirty, True
        self.unfinished.setdefault(seq.request_id, {})[seq] = None
        self.scheduler.add(seq)
        self.dirty = dirty

    def add_batch(self, seqs: list[Sequence]) -> None:
        """Queue sequences, all of them or none."""
        try:
            for seq in seqs:
                self.add(seq)
        except BaseException:
            self.abort(seqs)
            raise

    def has_request(self, request_id: str) -> bool:
        """Whether a request of that id is unfinished, or has news that nobody took yet."""
        return request_id in self.unfinished or any(
            seq.request_id == request_id for seq in self.advanced
        )

    def abort(self, seqs: Collection[Sequence]) -> None:
        """End sequences where they are, and forget their news. Steps in flight may still compute
        their tokens; they are thrown away."""
        if self.dirty:
            self._recover()
        self.dirty = True
        live = [seq for seq in seqs if seq in self.unfinished.get(seq.request_id, ())]
        for seq in live:
            seq.finish_reason = "abort"
        self.scheduler.finish(live)
        self._remove(live)
        for seq in seqs:
            self.advanced.pop(seq, None)
        self.dirty = False

    def step(self) -> list[Sequence]:
        """One round: submit a step if one can run, and read the oldest one when `depth` are in
        flight or none could be submitted. Sequences that got a token join `advanced`; those that
        ended have a finish_reason, and are returned for those who wait for nothing else.

        Raises what the executor raises. Unfinished requests then start over from their known tokens
        at the next call; but those that run when a step fails, and have no token more than when one
        failed before, end with the finish_reason "error".
        """
        finished = self._recover() if self.dirty else []
        self.dirty = self.is_stepping = True
        try:
            finished += self._round()
        except Exception:
            self._count_failure()
            raise
        finally:
            self.is_stepping = False
        self.dirty = False
        return finished

    def _round(self) -> list[Sequence]:
        scheduled = self.scheduler.schedule(can_preempt=not self.pending)
        if scheduled:
            self.pending.append((scheduled, self.executor.submit(scheduled.input)))
            self.metrics.add(scheduled.metrics)
        assert self.pending or not self.unfinished, "unfinished requests, and none can run"
        if self.pending and (not scheduled or len(self.pending) == self.depth):
            step, handle = self.pending.popleft()
            return self._process(step, handle.result())
        return []

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget what the pages hold. Returns False, and does nothing, while some are in use; or
        has those that use them start over from their known tokens."""
        if self.dirty:
            self._recover()
        pages = self.scheduler.block_manager
        if pages.num_free < pages.num_blocks and not reset_running_requests:
            return False
        self._recover()
        return True

    def _count_failure(self) -> None:
        """Whoever ran may be why the step failed, and would fail all that follow."""
        for seq in self.scheduler.running:
            if seq.failed_at == len(seq.token_ids) and not seq.finished:
                seq.finish_reason = "error"
            seq.failed_at = len(seq.token_ids)

    def _recover(self) -> list[Sequence]:
        """After an exception, Ctrl-C too, which may come at any line, of this method as well: keep
        what the sequences know, and compute all of it again. Returns those that turn out to have
        ended."""
        self.dirty = True
        self.pending.clear()
        unfinished = list(chain.from_iterable(self.unfinished.values()))
        for seq in unfinished:
            if len(seq.token_ids) > seq.num_prompt_tokens and not seq.finished:
                self._check_stop(seq)  # the exception may have come between a token and its check
            self.scheduler.logprobs.take(seq)
            if seq.finished and seq.finish_reason != "abort":
                seq.metrics.finished_time = time.monotonic()
                self.advanced[seq] = None
        live: dict[str, dict[Sequence, None]] = {}
        for seq in unfinished:
            if not seq.finished:
                live.setdefault(seq.request_id, {})[seq] = None
        self.unfinished = live
        self.scheduler.restart(list(chain.from_iterable(live.values())))
        finished = [seq for seq in unfinished if seq.finished]
        for seq in finished:
            self._count_request(seq)
        self.dirty = False
        return finished

    def _process(self, step: ScheduledStep, output: StepOutput) -> list[Sequence]:
        """Append a step's tokens. Returns the sequences that they end."""
        now = time.monotonic()
        advanced, finished = self.advanced, []
        for i, error in output.errors.items():
            if step.sampled[i].finished:
                continue  # as below
            for sample in step.sampled[i].samples:  # all of the request end by it
                if not sample.finished:
                    advanced[sample] = None
                    sample.error, sample.finish_reason = error, "error"
                    finished.append(sample)
        if output.logprobs is not None:
            self.scheduler.logprobs.put(step.input, step.sampled, output.logprobs)
        if output.scores is not None:
            _keep_scores(step, output.scores)
        for seq, token_id in zip(step.sampled, output.token_ids, strict=True):
            if seq.finish_reason is not None:
                continue  # ended while this step was in flight: it ran past its end
            advanced[seq] = None
            seq.token_ids.append(token_id)
            if token_id in seq.stops or len(seq.token_ids) >= seq.check_from:
                self._check_stop(seq)
                if seq.finished:
                    seq.metrics.finished_time = now
                    finished.append(seq)
        for seq in step.sampled[step.input.num_decodes :]:
            if seq.metrics.first_token_time is None:
                seq.metrics.first_token_time = now
        if finished:
            self.scheduler.finish(finished)
            self._remove(finished)
        return finished

    def _remove(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            samples = self.unfinished[seq.request_id]
            del samples[seq]
            if not samples:
                del self.unfinished[seq.request_id]
            self._count_request(seq)

    def _count_request(self, seq: Sequence) -> None:
        num_generated = len(seq.token_ids) - seq.num_prompt_tokens
        self.metrics.add_request(
            seq.num_prompt_tokens, num_generated, seq.finish_reason or "", seq.metrics
        )

    def _check_stop(self, seq: Sequence) -> None:
        """Whether the last token ends the sequence. A stop string that it completes counts before
        the token itself, as in vLLM."""
        if seq.params.stop:
            assert self.detokenizer is not None
            self.detokenizer.check_stop(seq)
        if not seq.finished:
            seq.check_stop()


def _keep_scores(step: ScheduledStep, scores: LogprobLines) -> None:
    """Append the lines of each scoring to its sequence's."""
    last = 0
    for seq, scoring in zip(step.scored, step.input.scorings, strict=True):
        first, last = last, last + len(scoring.token_ids)
        assert seq.scores is not None
        seq.scores.extend(scores.data[first:last])
