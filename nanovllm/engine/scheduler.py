"""Which tokens run in the next step: continuous batching with one token budget, chunked prefill,
preemption.

The engine calls schedule before each step and finish after a sequence's last one. Pages are the
block manager's business.
"""

from collections import deque
from dataclasses import dataclass

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.metrics import StepMetrics
from nanovllm.step import RowStart, StepInput


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step for the worker, the sequences that its sampled tokens belong to, and what it was."""

    input: StepInput
    sampled: list[Sequence]
    metrics: StepMetrics


class Scheduler:
    """First come, first served. Decodes run in every step; what is left of the budget goes to
    prefill chunks, oldest first.

    Args:
        block_manager: the pages.
        max_num_seqs: residents at most, that is sequences that hold pages and a row of the worker's
            state.
        max_num_batched_tokens: query tokens a step at most; at least max_num_seqs.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ):
        assert max_num_batched_tokens >= max_num_seqs
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival, so the youngest is last
        self.free_rows = list(reversed(range(max_num_seqs)))
        self.empty_slots = 0  # in the pages of running sequences

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self, can_preempt: bool) -> ScheduledStep | None:
        """The next step, or None if nothing can run before the pending steps are read.

        Args:
            can_preempt: no step is pending, so every sampled token is known and a sequence can be
                put back.
        """
        decodes = [seq for seq in self.running if seq.wants_decode]
        metrics = StepMetrics()
        while self._num_pages_needed(decodes) > self.block_manager.num_free:
            if not can_preempt:
                return None
            victim = self._preempt_youngest()
            metrics.preemptions += 1
            if victim in decodes:
                decodes.remove(victim)

        step = ScheduledStep(StepInput(), [], metrics)
        for seq in decodes:
            self._add_decode(step, seq)
        step.input.num_decodes = len(decodes)
        metrics.stopped_by = self._prefill(step, self.max_num_batched_tokens - len(decodes))
        self._measure(step)
        return step if step.input.rows else None

    def finish(self, finished: list[Sequence]) -> None:
        """Take back what ended sequences hold, wherever they are."""
        if any(seq.row < 0 for seq in finished):
            self.waiting = deque(seq for seq in self.waiting if not seq.finished)
        for seq in finished:
            if seq.row >= 0:
                self._release(seq)
        self.running = [seq for seq in self.running if not seq.finished]

    def restart(self, unfinished: list[Sequence]) -> None:
        """Start over from the sequences' known tokens: after a failed step neither pages nor lists
        can be trusted."""
        old = self.block_manager
        self.block_manager = BlockManager(old.num_blocks, old.block_size, old.enable_prefix_caching)
        for seq in unfinished:
            seq.reset()
        self.waiting, self.running = deque(unfinished), []
        self.free_rows = list(reversed(range(self.max_num_seqs)))
        self.empty_slots = 0

    def _prefill(self, step: ScheduledStep, budget: int) -> str:
        """Chunks of running sequences, then admissions, until something stops it; returns what."""
        for seq in self.running:
            if seq.is_prefilling and budget > 0:
                budget -= self._add_chunk(step, seq, budget)
        while self.waiting:
            if step.metrics.preemptions:
                return "preemption"  # the pages are for the older sequences that needed them
            if budget == 0:
                return "max_num_batched_tokens"
            if len(self.running) == self.max_num_seqs:
                return "max_num_seqs"
            if not self._admit(step):
                return "pages"
            budget -= self._add_chunk(step, self.running[-1], budget)
        cut_short = budget == 0 and self.running[-1].is_prefilling
        return "max_num_batched_tokens" if cut_short else ""

    def _num_pages_needed(self, decodes: list[Sequence]) -> int:
        return sum(map(self.block_manager.needs_page, decodes))

    def _preempt_youngest(self) -> Sequence:
        """Put the youngest sequence back to the head of the queue; its full pages stay in the
        prefix cache for as long as nobody needs them."""
        victim = self.running.pop()
        self._release(victim)
        victim.reset()
        self.waiting.appendleft(victim)
        return victim

    def _release(self, seq: Sequence) -> None:
        self.block_manager.register(seq)  # pages whose last token was read since it was scheduled
        self.empty_slots -= self._num_empty(seq)
        self.block_manager.free(seq)
        self.free_rows.append(seq.row)
        seq.row = -1

    def _admit(self, step: ScheduledStep) -> bool:
        """Move the oldest waiting sequence to the running ones, if there are pages for all its
        known tokens."""
        seq = self.waiting[0]
        num_shared = self.block_manager.allocate(seq)
        if num_shared is None:
            return False
        self.waiting.popleft()
        self.running.append(seq)
        seq.row = self.free_rows.pop()
        seq.prefill_end = len(seq.token_ids)
        # With every token cached the last one is computed again, for its logits; its page is
        # shared, so it isn't stored.
        seq.num_computed = min(num_shared, seq.prefill_end - 1)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = seq.num_computed
        self.empty_slots += self._num_empty(seq)
        step.metrics.cached_tokens += seq.num_computed
        step.input.starts.append(
            RowStart(
                row=seq.row,
                num_cached_tokens=num_shared,
                params=seq.params,
                seed=seq.seed,
                stop_token_ids=(*seq.eos_token_ids, *seq.stop_token_ids),
                min_len=min(seq.num_prompt_tokens + seq.params.min_tokens, seq.max_len),
            )
        )
        step.input.new_pages.append((seq.row, 0, list(seq.block_table)))
        return True

    def _add_decode(self, step: ScheduledStep, seq: Sequence) -> None:
        if self.block_manager.needs_page(seq):
            index = len(seq.block_table)
            step.input.new_pages.append((seq.row, index, [self.block_manager.append(seq)]))
            self.empty_slots += self.block_manager.block_size
        step.input.add(seq.row, seq.num_computed, query_len=1, samples=True)
        self._advance(step, seq, 1)

    def _add_chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        start = seq.num_computed
        end = min(seq.prefill_end, start + budget)
        step.input.token_ids += seq.token_ids[start:end]
        step.input.add(seq.row, start, end - start, samples=end == seq.prefill_end)
        self._advance(step, seq, end - start)
        return end - start

    def _advance(self, step: ScheduledStep, seq: Sequence, num_tokens: int) -> None:
        seq.num_computed += num_tokens
        self.empty_slots -= num_tokens
        if not seq.is_prefilling:
            seq.num_pending += 1
            step.sampled.append(seq)
        self.block_manager.register(seq)

    def _num_empty(self, seq: Sequence) -> int:
        return len(seq.block_table) * self.block_manager.block_size - seq.num_computed

    def _measure(self, step: ScheduledStep) -> None:
        metrics, pages = step.metrics, self.block_manager
        metrics.decode_tokens = step.input.num_decodes
        metrics.prefill_tokens = len(step.input.token_ids)
        metrics.running, metrics.waiting = len(self.running), len(self.waiting)
        metrics.page_slots = (pages.num_blocks - pages.num_free) * pages.block_size
        metrics.empty_slots = self.empty_slots
