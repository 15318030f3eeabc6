"""Which tokens run in the next step: continuous batching with one token budget, chunked prefill,
preemption.

The engine calls schedule before each step and finish after a sequence's last one. Pages are the
block manager's business.

Nearly all of a large batch decodes, and a step treats most of it alike: one token more, nothing
else. So what changes in every step lies in columns, arrays indexed by row, and only a sequence that
begins, ends or opens a page is looked at by itself.
"""

from collections import deque
from dataclasses import dataclass
from heapq import heappop, heappush

import numpy as np

from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.sequence import Sequence
from nanovllm.metrics import StepMetrics
from nanovllm.step import Chunk, RowStart, StepInput


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step for the worker, the sequences that its sampled tokens belong to (first those that
    decode), and what it was."""

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

    Attributes:
        waiting: sequences that hold nothing, the next to be admitted first.
        running: those that hold a row and pages, in order of arrival, so the youngest is last.
        seqs, max_len: [rows] of the running sequences.
        num_computed: [rows] tokens whose keys and values are stored, or will be by the steps
            submitted so far.
        decodes: [rows] whether the next step computes one token more: the prompt is computed, and
            the last token isn't in flight.
        empty_slots: in the pages of running sequences.
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
        self.seqs = np.empty(max_num_seqs, object)
        self.max_len = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.decodes = np.zeros(max_num_seqs, bool)
        self._clear()

    def _clear(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.free_rows = list(range(self.max_num_seqs))  # a heap
        self.seqs[:], self.decodes[:] = None, False
        self.empty_slots = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def schedule(self, can_preempt: bool) -> ScheduledStep | None:
        """The next step, or None if nothing can run before the pending steps are read.

        Args:
            can_preempt: no step is pending, so every sampled token is known and a sequence can be
                put back.
        """
        metrics = StepMetrics()
        while self._num_pages_needed() > self.block_manager.num_free:
            if not can_preempt:
                return None
            self._preempt_youngest()
            metrics.preemptions += 1

        step = ScheduledStep(StepInput(), [], metrics)
        self._decode(step)
        metrics.stopped_by = self._prefill(
            step, self.max_num_batched_tokens - step.input.num_decodes
        )
        self._measure(step)
        return step if step.sampled or step.input.chunks else None

    def finish(self, finished: list[Sequence]) -> None:
        """Take back what ended sequences hold, wherever they are."""
        if any(seq.row < 0 for seq in finished):
            self.waiting = deque(seq for seq in self.waiting if not seq.finished)
        for seq in finished:
            if seq.row >= 0:
                del self.running[seq]
                self._release(seq)

    def restart(self, unfinished: list[Sequence]) -> None:
        """Start over from the sequences' known tokens: after a failed step neither pages nor lists
        can be trusted."""
        old = self.block_manager
        self.block_manager = BlockManager(old.num_blocks, old.block_size, old.enable_prefix_caching)
        for seq in unfinished:
            seq.reset()
        self._clear()
        self.waiting += unfinished

    def _decode(self, step: ScheduledStep) -> None:
        """One token of each sequence that decodes."""
        rows = np.flatnonzero(self.decodes)
        positions = self.num_computed[rows]
        step.input.decode_rows, step.input.decode_positions = rows, positions
        step.sampled.extend(self.seqs[rows].tolist())
        for i in np.flatnonzero(self._opens_page(positions)).tolist():
            self._open_page(step, step.sampled[i])
        self.num_computed[rows] = positions + 1
        self.empty_slots -= len(rows)
        # The token fed has that position, the one sampled the next: is that the last?
        self.decodes[rows] = positions + 2 < self.max_len[rows]

    def _prefill(self, step: ScheduledStep, budget: int) -> str:
        """The rest of a prompt that the last step's budget cut, then admissions, until something
        stops it; returns what."""
        if self._is_prefilling_youngest():
            budget -= self._add_chunk(step, self._youngest(), budget)
        while self.waiting:
            if step.metrics.preemptions:
                return "preemption"  # the pages are for the older sequences that needed them
            if budget == 0:
                return "max_num_batched_tokens"
            if len(self.running) == self.max_num_seqs:
                return "max_num_seqs"
            if not self._admit(step):
                return "pages"
            budget -= self._add_chunk(step, self._youngest(), budget)
        return "max_num_batched_tokens" if self._is_prefilling_youngest() else ""

    def _youngest(self) -> Sequence:
        return next(reversed(self.running))

    def _is_prefilling_youngest(self) -> bool:
        """Whether there is a sequence in the middle of its prompt. It can only be the youngest, as
        others are admitted with what the older ones leave of the budget."""
        if not self.running:
            return False
        seq = self._youngest()
        return self.num_computed[seq.row] < seq.prefill_end

    def _opens_page(self, positions: np.ndarray) -> np.ndarray:
        """Whether decodes need a page more; their tokens so far are all that theirs hold."""
        return positions % self.block_manager.block_size == 0

    def _num_pages_needed(self) -> int:
        return int(np.count_nonzero(self._opens_page(self.num_computed[self.decodes])))

    def _preempt_youngest(self) -> None:
        """Put the youngest sequence back to the head of the queue; its full pages stay in the
        prefix cache for as long as nobody needs them."""
        victim, _ = self.running.popitem()
        self._release(victim)
        victim.reset()
        self.waiting.appendleft(victim)

    def _release(self, seq: Sequence) -> None:
        self._register(seq)  # pages whose last token was read since it was scheduled
        self.empty_slots -= self._num_empty(seq)
        self.block_manager.free(seq)
        self.seqs[seq.row], self.decodes[seq.row] = None, False
        heappush(self.free_rows, seq.row)
        seq.row = -1

    def _admit(self, step: ScheduledStep) -> bool:
        """Move the oldest waiting sequence to the running ones, if there are pages for all its
        known tokens."""
        seq = self.waiting[0]
        num_shared = self.block_manager.allocate(seq)
        if num_shared is None:
            return False
        self.waiting.popleft()
        self.running[seq] = None
        seq.row = row = heappop(self.free_rows)
        seq.prefill_end = len(seq.token_ids)
        # With every token cached the last one is computed again, for its logits; its page is
        # shared, so it isn't stored.
        num_cached = min(num_shared, seq.prefill_end - 1)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
        self.seqs[row], self.max_len[row], self.num_computed[row] = seq, seq.max_len, num_cached
        self.empty_slots += self._num_empty(seq)
        step.metrics.cached_tokens += num_cached
        step.input.starts.append(
            RowStart(
                row=row,
                num_cached_tokens=num_shared,
                params=seq.params,
                seed=seq.seed,
                stop_token_ids=(*seq.eos_token_ids, *seq.stop_token_ids),
                min_len=min(seq.num_prompt_tokens + seq.params.min_tokens, seq.max_len),
            )
        )
        step.input.new_pages.add(row, 0, seq.block_table)
        return True

    def _open_page(self, step: ScheduledStep, seq: Sequence) -> None:
        """One page more for a decode; the one before is full, and all its tokens have been read."""
        self._register(seq)
        page = self.block_manager.append(seq)
        step.input.new_pages.add(seq.row, len(seq.block_table) - 1, [page])
        self.empty_slots += self.block_manager.block_size

    def _add_chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        start = int(self.num_computed[seq.row])
        end = min(seq.prefill_end, start + budget)
        samples = end == seq.prefill_end
        step.input.chunks.append(Chunk(seq.row, start, seq.token_ids[start:end], samples))
        self.num_computed[seq.row] = end
        self.empty_slots -= end - start
        if samples:
            step.sampled.append(seq)
            self.decodes[seq.row] = end + 1 < seq.max_len
        self._register(seq)
        return end - start

    def _register(self, seq: Sequence) -> None:
        self.block_manager.register(seq, int(self.num_computed[seq.row]))

    def _num_empty(self, seq: Sequence) -> int:
        num_slots = len(seq.block_table) * self.block_manager.block_size
        return num_slots - int(self.num_computed[seq.row])

    def _measure(self, step: ScheduledStep) -> None:
        metrics, pages = step.metrics, self.block_manager
        metrics.decode_tokens = step.input.num_decodes
        metrics.prefill_tokens = sum(len(chunk.token_ids) for chunk in step.input.chunks)
        metrics.running, metrics.waiting = len(self.running), len(self.waiting)
        metrics.page_slots = (pages.num_blocks - pages.num_free) * pages.block_size
        metrics.empty_slots = self.empty_slots
