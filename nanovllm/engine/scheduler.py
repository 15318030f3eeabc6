"""Which tokens run in the next step: continuous batching with one token budget, chunked prefill,
preemption.

The engine calls schedule before each step and finish after a sequence's last one. Pages are the
block manager's business.

Nearly all of a large batch decodes, and a step treats most of it alike: one token more, nothing
else. So what changes in every step lies in columns, arrays indexed by row, and only a sequence that
begins, ends or opens a page is looked at by itself.
"""

from array import array
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from nanovllm.core.metrics import StepMetrics
from nanovllm.core.step import Chunk, RowStart, Scoring, StepInput
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.forecast import expected_steps, peak_pages
from nanovllm.engine.recent_logprobs import RecentLogprobs
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import SampleLogprobs

# Tokens that a sequence is expected to generate before a stop token, until some have ended, and
# over how many sequences means are.
MEAN_OUTPUT, NUM_AVERAGED = 256, 64
# Prompts start in steps of one launch each if so many of these have room for all that could start,
# else in one with the whole budget (docs/decisions/0023).
MIXED_STEPS = 4
# In that case those that wait for rows start together: when such a share of the rows is free, or
# those free are for such a share of a step's tokens, or one was for so many steps
# (docs/decisions/0022).
STARTING_ROWS, STARTING_TOKENS, STARTING_STEPS = 1 / 8, 1 / 4, 8


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step for the worker, the sequences that its sampled tokens belong to (first those that
    decode), what it was, and the sequences that its scorings are for."""

    input: StepInput
    sampled: list[Sequence]
    metrics: StepMetrics
    scored: list[Sequence] = field(default_factory=list)


class Scheduler:
    """First come, first served. Decodes run in every step; what is left of the budget goes to
    prefill chunks, oldest first. A sequence is admitted when its pages, and those that all will
    need before they end, are there (docs/decisions/0010).

    Args:
        block_manager: the pages.
        max_num_seqs: residents at most, that is sequences that hold pages and a row of the worker's
            state.
        max_num_batched_tokens: query tokens a step at most; at least max_num_seqs.
        mixed_tokens, mixed_keys: as the engine's.

    Attributes:
        waiting: sequences that hold nothing, the next to be admitted first.
        running: those that hold a row and pages, in order of arrival, so the youngest is last.
        seqs, max_len, num_prompt_tokens: [rows] of the running sequences; max_len 0: none.
        may_stop: [rows] whether something may end it before max_len.
        num_shared: [rows] pages that it holds but doesn't own.
        num_computed: [rows] tokens whose keys and values are stored, or will be by the steps
            submitted so far.
        decodes: [rows] whether the next step computes one token more: the prompt is computed, and
            the last token isn't in flight.
        logprobs: [rows] those that sequences have not taken yet.
        empty_slots: in the pages of running sequences.
        pages_to_come: those that running sequences would still take up to their max_len.
        mean_output: tokens of the last sequences that might have stopped early.
        num_admitted: sequences so far.
        mean_new: tokens that the last of them had to compute then.
        waits_for_rows, waits_for_pages: whether some did when the last step was scheduled; who
            waits for rows does so until all that waited have started, or some together.
        steps_waited: how many steps of one launch have left rows free since.
    """

    def __init__(
        self,
        block_manager: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        mixed_tokens: int | None = None,
        mixed_keys: int = 2**62,
    ):
        assert max_num_batched_tokens >= max_num_seqs
        self.block_manager = block_manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.mixed_tokens, self.mixed_keys = mixed_tokens, mixed_keys
        self.seqs = np.empty(max_num_seqs, object)
        self.max_len = np.zeros(max_num_seqs, np.int64)
        self.num_prompt_tokens = np.zeros(max_num_seqs, np.int64)
        self.may_stop = np.zeros(max_num_seqs, bool)
        self.num_shared = np.zeros(max_num_seqs, np.int64)
        self.num_computed = np.zeros(max_num_seqs, np.int64)
        self.decodes = np.zeros(max_num_seqs, bool)
        self.logprobs = RecentLogprobs(max_num_seqs)
        self.mean_output = float(MEAN_OUTPUT)
        self.num_admitted, self.mean_new = 0, 0.0
        self._clear()

    def _clear(self) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: dict[Sequence, None] = {}
        self.free_rows = list(range(self.max_num_seqs))  # a heap
        self.seqs[:], self.max_len[:], self.decodes[:] = None, 0, False
        self.empty_slots = self.pages_to_come = 0
        self.waits_for_rows = self.waits_for_pages = False
        self.steps_waited = 0

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def best_order(self, seqs: list[Sequence]) -> list[Sequence]:
        """The order in which a batch is done soonest. Where rows are too few it is longest first:
        what starts last would else run on alone. Where pages are too few it is the given one, as
        sequences of like length need their most pages all at the same time."""
        num_pages = sum(self.block_manager.num_pages(seq.max_len) for seq in seqs)
        if len(seqs) <= self.max_num_seqs or (
            num_pages * self.max_num_seqs > self.block_manager.num_blocks * len(seqs)
        ):
            return seqs
        return sorted(seqs, key=lambda seq: seq.num_prompt_tokens - seq.max_len)

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
            if seq.may_stop and seq.finish_reason != "abort":
                num_output = len(seq.token_ids) - seq.num_prompt_tokens
                self.mean_output += (num_output - self.mean_output) / NUM_AVERAGED

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
        step.sampled.extend(self.seqs[rows].tolist())
        pages = np.full(len(rows), -1, np.int32)
        for i in np.flatnonzero(self._opens_page(positions)).tolist():
            pages[i] = self._open_page(step.sampled[i])
        step.input.decode_rows, step.input.decode_positions = rows, positions
        step.input.decode_blocks = pages[None]
        self.num_computed[rows] = positions + 1
        self.empty_slots -= len(rows)
        # The token fed has that position, the one sampled the next: is that the last?
        self.decodes[rows] = positions + 2 < self.max_len[rows]

    def _prefill(self, step: ScheduledStep, budget: int) -> str:
        """The rest of a prompt that the last step's budget cut, then admissions, until something
        stops it; returns what."""
        begun, num_decodes, is_large = self._prefilling(), step.input.num_decodes, True
        first = self.waiting[0] if begun is None and self.waiting else begun
        can_mix = num_decodes > 0 and not step.metrics.preemptions
        if can_mix and first is not None and self.mixed_tokens is not None:
            room = max(0, min(self.mixed_tokens - num_decodes, self._mixed_room(first)))
            is_large = room >= budget or self._starts_large(room, begun)
            budget = budget if is_large else room
        if begun is not None:
            budget -= self._add_chunk(step, begun, budget)
        stopped_by = self._admissions(step, budget, is_large)
        if stopped_by == "max_num_batched_tokens" and not is_large:
            stopped_by = "mixed_tokens"
        waited = self.waits_for_rows and stopped_by == "mixed_tokens"
        self.waits_for_rows = waited or stopped_by == "max_num_seqs"
        self.waits_for_pages = stopped_by == "pages"
        self.steps_waited = self.steps_waited + 1 if waited and self.free_rows else 0
        return stopped_by

    def _mixed_room(self, seq: Sequence) -> int:
        """So many tokens of a prompt at most are for a step of one launch."""
        return 0 if seq.scores is not None else self.mixed_keys // len(seq.token_ids)

    def _starts_large(self, room: int, begun: Sequence | None) -> bool:
        """Whether prompts, one of which may have begun, take the whole budget, not just the room
        that is left for them in a step of one launch."""
        num_starting = min(len(self.free_rows), len(self.waiting))
        if self.waits_for_pages:
            num_starting = min(num_starting, 1)
        rest = 0 if begun is None else begun.prefill_end - int(self.num_computed[begun.row])
        num_new = num_starting * self.mean_new
        if rest + num_new <= MIXED_STEPS * room:
            return False
        if rest > MIXED_STEPS * room or not self.waits_for_rows:
            return True
        return (
            num_starting >= min(int(self.max_num_seqs * STARTING_ROWS), len(self.waiting))
            or num_new >= self.max_num_batched_tokens * STARTING_TOKENS
            or self.steps_waited >= STARTING_STEPS
        )

    def _admissions(self, step: ScheduledStep, budget: int, is_large: bool) -> str:
        """Of waiting sequences, until something stops them; returns what."""
        while self.waiting:
            if not is_large:
                budget = min(budget, self._mixed_room(self.waiting[0]))
            if step.metrics.preemptions:
                return "preemption"  # the pages are for the older sequences that needed them
            if len(self.running) == self.max_num_seqs:
                return "max_num_seqs"
            if budget == 0:
                return "max_num_batched_tokens"
            if not self._admit(step, budget):
                return "pages"
            budget -= self._add_chunk(step, self._youngest(), budget)
        return "max_num_batched_tokens" if self._prefilling() is not None else ""

    def _youngest(self) -> Sequence:
        return next(reversed(self.running))

    def _prefilling(self) -> Sequence | None:
        """The sequence in the middle of its prompt, if there is one. It can only be the youngest,
        as others are admitted with what the older ones leave of the budget."""
        if not self.running:
            return None
        seq = self._youngest()
        return seq if self.num_computed[seq.row] < seq.prefill_end else None

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
        self.logprobs.take(seq)
        self._register(seq)  # pages whose last token was read since it was scheduled
        self.empty_slots -= self._num_empty(seq)
        self.pages_to_come -= self._num_to_come(seq)
        self.block_manager.free(seq)
        self.seqs[seq.row], self.max_len[seq.row], self.decodes[seq.row] = None, 0, False
        heappush(self.free_rows, seq.row)
        seq.row = -1

    def _admit(self, step: ScheduledStep, budget: int) -> bool:
        """Move the oldest waiting sequence to the running ones, if its pages are there, and those
        that are still to come."""
        seq, pages = self.waiting[0], self.block_manager
        hits = array("i") if seq.params.skip_reading_prefix_cache else pages.find_prefix(seq)
        if seq.scores is not None:
            hits = hits[: seq.num_cacheable // pages.block_size]
        num_shared, owners = pages.holders(hits)
        num_left = len(seq.token_ids) - len(hits) * pages.block_size - budget
        if not self._has_pages(seq, num_shared, owners, num_left):
            return False
        for owner in owners:
            self.num_shared[owner.row] += 1
        pages.allocate(seq, hits)
        self.waiting.popleft()
        self.running[seq] = None
        seq.row = row = heappop(self.free_rows)
        seq.prefill_end = len(seq.token_ids)
        if seq.logprobs is not None:
            self.logprobs.width = max(self.logprobs.width, seq.logprobs.width)
        # With every token cached the last one is computed again, for its logits; its page is
        # shared, so it isn't stored.
        num_cached_tokens = len(hits) * pages.block_size
        num_cached = min(num_cached_tokens, seq.prefill_end - 1)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
        self.seqs[row], self.max_len[row] = seq, seq.max_len
        self.num_prompt_tokens[row], self.may_stop[row] = seq.num_prompt_tokens, seq.may_stop
        self.num_computed[row], self.num_shared[row] = num_cached, num_shared
        self.empty_slots += self._num_empty(seq)
        self.pages_to_come += self._num_to_come(seq)
        step.metrics.cached_tokens += num_cached
        self.num_admitted += 1
        num_new = seq.prefill_end - num_cached
        self.mean_new += (num_new - self.mean_new) / min(self.num_admitted, NUM_AVERAGED)
        min_tokens = seq.params.min_tokens
        step.input.starts.append(
            RowStart(
                row=row,
                num_cached_tokens=num_cached_tokens,
                params=seq.params,
                seed=seq.seed,
                stop_token_ids=(*seq.eos_token_ids, *seq.stop_token_ids),
                min_len=min(seq.num_prompt_tokens + min_tokens, seq.max_len) if min_tokens else 0,
                block_tables=(np.array(seq.block_table, np.int32),),
                num_prompt_tokens=seq.num_prompt_tokens,
                token_ids=seq.token_ids[:] if seq.params.needs_history else (),
            )
        )
        return True

    def _has_pages(
        self, seq: Sequence, num_shared: int, owners: list[Sequence], num_left: int
    ) -> bool:
        """Whether a waiting sequence can run beside those that do, and nobody need be preempted
        until they end, as far as that can be known (docs/decisions/0010).

        Args:
            num_shared: pages that others hold.
            owners: of those that have one.
            num_left: tokens of its prompt that later steps compute.
        """
        pages = self.block_manager
        num_new = pages.num_pages(len(seq.token_ids)) - num_shared
        if num_new > pages.num_free:
            return False
        if num_new + self._num_to_come(seq) + self.pages_to_come <= pages.num_free:
            return True  # even if nobody gives any back
        rows = np.flatnonzero(self.max_len)
        num_owned = -(-self.num_computed[rows] // pages.block_size) - self.num_shared[rows]
        for owner in owners:
            num_owned[rows == owner.row] -= 1
        # Pages without an owner stay for those who share them.
        num_staying = pages.num_blocks - pages.num_free - int(num_owned.sum())

        num_tokens = np.append(self.num_computed[rows], len(seq.token_ids))
        num_steps = expected_steps(
            num_tokens,
            np.append(self.num_prompt_tokens[rows], seq.num_prompt_tokens),
            np.append(self.max_len[rows], seq.max_len),
            np.append(self.may_stop[rows], seq.may_stop),
            int(self.mean_output),
        )
        # While its prompt is computed in chunks, the others go on.
        num_steps[-1] += -(-max(num_left, 0) // (self.max_num_batched_tokens - len(rows)))
        if num_left > 0 and self.mixed_tokens is not None:
            num_steps[-1] += MIXED_STEPS
        peak = peak_pages(num_tokens, num_steps, np.append(num_owned, num_new), pages.block_size)
        return num_staying + peak <= pages.num_blocks or not self.running

    def _open_page(self, seq: Sequence) -> int:
        """One page more for a decode; the one before is full, and all its tokens have been read."""
        self._register(seq)
        self.pages_to_come -= 1
        self.empty_slots += self.block_manager.block_size
        return self.block_manager.append(seq)

    def _add_chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        start = int(self.num_computed[seq.row])
        end = min(seq.prefill_end, start + budget)
        samples = end == seq.prefill_end
        step.input.chunks.append(Chunk(seq.row, start, seq.token_ids[start:end], samples))
        if seq.scores is not None:
            self._score(step, seq, seq.scores, start, end)
        self.num_computed[seq.row] = end
        self.empty_slots -= end - start
        if samples:
            step.sampled.append(seq)
            self.decodes[seq.row] = end + 1 < seq.max_len
        self._register(seq)
        return end - start

    def _score(
        self, step: ScheduledStep, seq: Sequence, scores: SampleLogprobs, start: int, end: int
    ) -> None:
        """Ask for the tokens after those of the last chunk, [start, end), as far as they are wanted
        and were not read before a preemption."""
        first = max(start + 1, seq.score_from + len(scores))
        token_ids = seq.targets[first - seq.score_from : max(0, end + 1 - seq.score_from)]
        if token_ids:
            chunk, num_top = len(step.input.chunks) - 1, scores.width - 1
            step.input.scorings.append(Scoring(chunk, first - 1 - start, token_ids, num_top))
            step.scored.append(seq)

    def _num_to_come(self, seq: Sequence) -> int:
        """Pages that a sequence will take after those of its known tokens."""
        pages = self.block_manager
        num_now = len(seq.block_table) or pages.num_pages(len(seq.token_ids))
        return pages.num_pages(seq.max_len - 1) - num_now  # the last token is never stored

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
