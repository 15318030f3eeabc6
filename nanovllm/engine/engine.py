"""The engine: requests come in, steps go to the worker, sampled tokens come back and end sequences.

thread.py drives it; what runs in a step is the scheduler's choice, how it runs the executor's.
"""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

from nanovllm.core.metrics import EngineMetrics
from nanovllm.core.step import Executor, PendingStep, StepOutput
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.policy import Policy
from nanovllm.engine.scheduler import ScheduledStep, Scheduler
from nanovllm.engine.sequence import Sequence, shown
from nanovllm.outputs import LogprobLines


@dataclass(slots=True)
class News:
    """What came of a round: the sequences that have a token more or have ended, of these the
    sequences that have ended, and what the executor raised, or None."""

    advanced: list[Sequence] = field(default_factory=list)
    ended: list[Sequence] = field(default_factory=list)
    error: BaseException | None = None


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
        # Request id -> its samples that have not ended, in order.
        self.unfinished: dict[str, dict[Sequence, None]] = {}

    @property
    def has_unfinished(self) -> bool:
        return bool(self.unfinished or self.pending)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Its request id must be new, or that of its other samples, which were
        added just before; and it must fit in the cache alone."""
        assert seq.siblings or seq.request_id not in self.unfinished
        self.unfinished.setdefault(seq.request_id, {})[seq] = None
        self.scheduler.add(seq)

    def add_batch(self, seqs: list[Sequence]) -> None:
        """Queue sequences, all of them or none."""
        try:
            for seq in seqs:
                self.add(seq)
        except BaseException:
            self.abort(seqs)
            raise

    def abort(self, seqs: Iterable[Sequence]) -> list[Sequence]:
        """End sequences where they are. Steps in flight may still compute their tokens, which are
        thrown away. Returns the sequences that had not ended before."""
        live = [seq for seq in seqs if seq in self.unfinished.get(seq.request_id, ())]
        for seq in live:
            seq.finish_reason = "abort"
        self.scheduler.finish(live)
        self._remove(live)
        return live

    def step(self) -> News:
        """One round: submit a step if one can run, and read the oldest one when `depth` are in
        flight or none could be submitted.

        When the executor raises, unfinished sequences start over from their known tokens; but a
        sequence that was running, and has no token more than when a step failed before, ends with
        the finish_reason "error".
        """
        try:
            scheduled = self.scheduler.schedule(can_preempt=not self.pending)
            if scheduled:
                self.pending.append((scheduled, self.executor.submit(scheduled.input)))
                self.metrics.add(scheduled.metrics)
            assert self.pending or not self.unfinished, "unfinished requests, and none can run"
            if self.pending and (not scheduled or len(self.pending) == self.depth):
                step, handle = self.pending.popleft()
                return self._process(step, handle.result())
        except BaseException as error:  # a logits processor may raise anything
            ended = self._end_failing(error) + self.restart()
            return News(ended, ended, error)
        return News()

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget what the blocks hold. Returns False, and does nothing, while blocks are in use; or
        has the sequences that use them start over from their known tokens."""
        blocks = self.scheduler.block_manager
        if blocks.num_free < blocks.num_blocks and not reset_running_requests:
            return False
        self.restart()
        return True

    def restart(self) -> list[Sequence]:
        """Keep what the unfinished sequences know, and compute all of it again: neither blocks nor
        lists nor the steps in flight can be trusted. Returns the sequences that turn out to have
        ended: their last token was not checked yet."""
        self.pending.clear()
        ended, unfinished = [], list(chain.from_iterable(self.unfinished.values()))
        for seq in unfinished:
            self.scheduler.logprobs.take(seq)
            if len(seq.token_ids) > seq.num_prompt_tokens:
                self._check_stop(seq)
            if seq.finished:
                ended.append(seq)
        self._remove(ended)
        self.scheduler.restart([seq for seq in unfinished if not seq.finished])
        return ended

    def _end_failing(self, error: BaseException) -> list[Sequence]:
        """A step has failed. A sequence that was running may be why, and would fail all steps that
        follow. Returns the sequences that end by it."""
        ended = []
        for seq in self.scheduler.running:
            if seq.finished:
                continue
            if seq.failed_at == len(seq.token_ids):
                seq.error, seq.finish_reason = shown(error, str), "error"
                seq.metrics.finished_time = time.monotonic()
                ended.append(seq)
            seq.failed_at = len(seq.token_ids)
        self._remove(ended)
        return ended

    def _process(self, step: ScheduledStep, output: StepOutput) -> News:
        """Append a step's tokens, and see which sequences they end."""
        now = time.monotonic()
        advanced: list[Sequence] = []
        ended: list[Sequence] = []
        for i, error in output.errors.items():
            if step.sampled[i].finished:
                continue  # as below
            for sample in step.sampled[i].samples:  # all of the request end by it
                if not sample.finished:
                    self._fail(
                        sample, "logits_processors, structured_outputs or other parameters", error
                    )
                    ended.append(sample)
        advanced += ended
        if output.logprobs is not None:
            self.scheduler.logprobs.put(step.input, step.sampled, output.logprobs)
        if output.scores is not None:
            _keep_scores(step, output.scores)
        num_decodes, between = step.input.num_decodes, self.metrics.between_tokens
        prefilled = [seq for seq in step.sampled[num_decodes:] if seq.finish_reason is None]
        for seq in prefilled:
            if len(seq.token_ids) > seq.num_prompt_tokens:  # it was preempted
                between.add(now - (seq.metrics.last_token_time or now))
            seq.metrics.first_token_time = seq.metrics.first_token_time or now
        # The decodes' last tokens came together, in the step before.
        before = step.sampled[0].metrics.last_token_time if num_decodes else None
        num_failed = len(advanced)
        for seq, token_id in zip(step.sampled, output.token_ids, strict=True):
            if seq.finish_reason is not None:
                continue  # ended while this step was in flight: it ran past its end
            advanced.append(seq)
            seq.token_ids.append(token_id)
            seq.metrics.last_token_time = now
            if token_id in seq.stops or len(seq.token_ids) >= seq.check_from:
                self._check_stop(seq)
                if seq.finished:
                    seq.metrics.finished_time = now
                    ended.append(seq)
        if num_decodes:
            between.add(now - (before or now), len(advanced) - num_failed - len(prefilled))
        if ended:
            self.scheduler.finish(ended)
            self._remove(ended)
        return News(advanced, ended)

    def _remove(self, seqs: list[Sequence]) -> None:
        for seq in seqs:
            samples = self.unfinished[seq.request_id]
            del samples[seq]
            if not samples:
                del self.unfinished[seq.request_id]
            if seq.finish_reason != "abort" and seq.metrics.finished_time is None:
                seq.metrics.finished_time = time.monotonic()
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
            try:
                self.detokenizer.check_stop(seq)
            except Exception as error:  # a tokenizer may raise anything
                self._fail(seq, "stop strings", error)
        if not seq.finished:
            seq.check_stop()

    def _fail(self, seq: Sequence, where: str, error: BaseException) -> None:
        num_tokens = len(seq.token_ids) - seq.num_prompt_tokens
        seq.finish_reason = "error"
        seq.error = (
            f"request {seq.request_id!r} ended by an error in its {where} after {num_tokens} "
            f"tokens: {shown(error)}"
        )


def _keep_scores(step: ScheduledStep, scores: LogprobLines) -> None:
    """Append the lines of each scoring to its sequence's."""
    last = 0
    for seq, scoring in zip(step.scored, step.input.scorings, strict=True):
        first, last = last, last + len(scoring.token_ids)
        assert seq.scores is not None
        seq.scores.extend(scores.data[first:last])
