"""Which tokens run in the next step: continuous batching with one token budget, chunked prefill,
preemption.

The engine calls schedule before each step and finish after a sequence's last one. Which sequence is
next is the policy's choice, blocks are the block manager's business, and how many prompt tokens
join a step is the executor's.

Nearly all sequences of a large batch decode: one token more, nothing else. So what changes in every
step lies in columns, arrays indexed by row, and only a sequence that begins, ends or opens a block
is looked at by itself.
"""

import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import islice

import numpy as np

from nanovllm.core.metrics import StepMetrics
from nanovllm.core.step import MIXED_STEPS, Chunk, Executor, RowStart, StepInput
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.forecast import expected_steps, peak_blocks
from nanovllm.engine.policy import FirstComeFirstServed, Policy
from nanovllm.engine.recent_logprobs import RecentLogprobs
from nanovllm.engine.sequence import Sequence

# Tokens that a sequence is expected to generate before a stop token, until some have ended, and
# over how many sequences the mean is.
MEAN_OUTPUT, NUM_AVERAGED = 256, 64


@dataclass(frozen=True, slots=True)
class ScheduledStep:
    """A step for the worker, the sequences that its sampled tokens belong to (first the decodes'),
    what the step was, and the sequences that its scorings are for."""

    input: StepInput
    sampled: list[Sequence]
    metrics: StepMetrics
    scored: list[Sequence] = field(default_factory=list)


class Scheduler:
    """Decodes run in every step; what the executor leaves of the budget goes to prompts, one after
    another, so only the last admitted sequence can be in the middle of its prompt. A sequence is
    admitted when its blocks, and all blocks that running sequences will need before they end, are
    there (docs/decisions/0010).

    Args:
        executor: says what blocks there are, and how many prompt tokens may join a step.
        max_num_seqs: running sequences at most, which hold blocks and a row of the worker's state.
        max_num_batched_tokens: query tokens per step at most; at least max_num_seqs.
        enable_prefix_caching: whether sequences that start with the same tokens share blocks.
        policy: which sequence is admitted next, and which is preempted.

    Attributes:
        waiting: sequences that hold nothing, in order of arrival; preempted ones come first.
        running: sequences that hold a row and blocks, in order of admission.
        free_rows: a heap.
        seqs, max_len, num_prompt_tokens, may_stop: [rows] what the running sequences are; max_len
            is 0 in free rows.
        num_computed: [rows] tokens whose keys and values are stored, or will be by the steps
            submitted so far.
        num_slots, max_slots: [rows] tokens that its blocks have room for, now and in the end.
        decodes: [rows] whether the next step computes one token more: the prompt is computed, and
            the last token isn't in flight.
        logprobs: [rows] log-probabilities that sequences have not taken yet.
        mean_output: tokens of the last sequences that might have stopped early.
    """

    def __init__(
        self,
        executor: Executor,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
        policy: Policy | None = None,
    ):
        assert max_num_batched_tokens >= max_num_seqs
        self.executor = executor
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.policy = policy or FirstComeFirstServed()
        self.seqs = np.empty(max_num_seqs, object)
        numbers, flags = np.zeros((5, max_num_seqs), np.int64), np.zeros((2, max_num_seqs), bool)
        self.max_len, self.num_prompt_tokens, self.num_computed = numbers[:3]
        self.num_slots, self.max_slots = numbers[3:]
        self.may_stop, self.decodes = flags
        self.logprobs = RecentLogprobs(max_num_seqs)
        self.mean_output = float(MEAN_OUTPUT)
        self.restart([])

    def restart(self, unfinished: list[Sequence]) -> None:
        """Start over from the sequences' known tokens, with an empty cache: after a failed step
        neither blocks nor lists can be trusted."""
        for seq in unfinished:
            seq.reset()
        self.block_manager = BlockManager(self.executor.groups, self.enable_prefix_caching)
        self.waiting: OrderedDict[Sequence, None] = OrderedDict.fromkeys(unfinished)
        self.running: dict[Sequence, None] = {}
        self.free_rows = list(range(self.max_num_seqs))
        self.seqs[:], self.decodes[:] = None, False
        self.max_len[:] = self.num_computed[:] = self.num_slots[:] = self.max_slots[:] = 0

    def add(self, seq: Sequence) -> None:
        self.waiting[seq] = None

    def finish(self, finished: list[Sequence]) -> None:
        """Take back what ended sequences hold, wherever they are."""
        for seq in finished:
            if seq.row >= 0:
                self._release(seq)
            else:
                del self.waiting[seq]
            if seq.may_stop and seq.finish_reason != "abort":
                num_output = len(seq.token_ids) - seq.num_prompt_tokens
                self.mean_output += (num_output - self.mean_output) / NUM_AVERAGED

    def schedule(self, can_preempt: bool) -> ScheduledStep | None:
        """The next step, or None if nothing can run before the pending steps are read.

        Args:
            can_preempt: no step is pending, so every sampled token is known and a sequence can be
                put back.
        """
        metrics = StepMetrics()
        rows, opening = self._decoding()
        while len(opening) > self.block_manager.num_free:
            if not can_preempt:
                return None
            victim = self.policy.victim(self.running)
            self._release(victim)
            victim.reset()
            self.waiting[victim] = None
            self.waiting.move_to_end(victim, last=False)
            metrics.preemptions += 1
            rows, opening = self._decoding()

        step = self._decode(rows, opening, metrics)
        metrics.stopped_by = self._prefill(step)
        if not step.sampled and not step.input.chunks:
            return None
        blocks = self.block_manager
        metrics.decode_tokens = len(rows)
        metrics.prefill_tokens = sum(len(chunk.token_ids) for chunk in step.input.chunks)
        metrics.running, metrics.waiting = len(self.running), len(self.waiting)
        num_used = sum(pool.num_blocks - len(pool.free_blocks) for pool in blocks.pools)
        metrics.block_slots = num_used * blocks.block_size
        num_empty = int((self.num_slots - self.num_computed).sum())
        metrics.empty_slots = num_empty * len(blocks.pools)
        return step

    # Decodes

    def _decoding(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows that decode in the next step, and which of them, by index, need a block more. These
        have free what lies outside of windows; their full blocks can be hit."""
        rows = np.flatnonzero(self.decodes)
        positions = self.num_computed[rows]
        opening = np.flatnonzero(positions == self.num_slots[rows])
        for seq, position in zip(
            self.seqs[rows[opening]].tolist(), positions[opening].tolist(), strict=True
        ):
            self.block_manager.register(seq, position)
            if self.block_manager.has_windows:
                self.block_manager.free_outside(seq, position)
        return rows, opening

    def _decode(self, rows: np.ndarray, opening: np.ndarray, metrics: StepMetrics) -> ScheduledStep:
        """A step of one token of each sequence that decodes."""
        positions, seqs = self.num_computed[rows], self.seqs[rows].tolist()
        blocks = np.full((len(self.block_manager.groups), len(rows)), -1, np.int32)
        if len(opening):
            opened = [seqs[i] for i in opening.tolist()]
            blocks[:, opening] = self.block_manager.append(opened, rows[opening])
            self.num_slots[rows[opening]] += self.block_manager.block_size
        self.num_computed[rows] = positions + 1
        # The token fed has that position, the one sampled the next: is that the last?
        self.decodes[rows] = positions + 2 < self.max_len[rows]
        step = StepInput(decode_rows=rows, decode_positions=positions, decode_blocks=blocks)
        return ScheduledStep(step, seqs, metrics)

    # Prompts

    def _prefill(self, step: ScheduledStep) -> str:
        """The rest of a prompt that the last step's budget cut, then admissions, until something
        stops them; returns what."""
        blocks, num_decodes = self.block_manager, step.input.num_decodes
        seq, stopped_by, budget, num_spare = next(reversed(self.running), None), "", 0, 0
        if seq is not None and self.num_computed[seq.row] >= seq.prefill_end:
            seq = None
        while seq is not None or self.waiting:
            if seq is None:
                if step.metrics.preemptions:
                    return "preemption"  # the blocks are for running sequences that needed them
                if len(self.running) >= self.max_num_seqs:
                    return "max_num_seqs"
            if not stopped_by:
                slots_to_come = int((self.max_slots - self.num_slots).sum())
                num_spare = blocks.num_free - slots_to_come // blocks.block_size
                prompts = self._prompts(seq, num_spare)
                budget = self.executor.prompt_budget(num_decodes, prompts)
                is_whole = budget == self.max_num_batched_tokens - num_decodes
                stopped_by = "max_num_batched_tokens" if is_whole else "prompt_budget"
            if budget == 0:
                return stopped_by
            if seq is None:
                seq = self.policy.next(self.waiting)
                hits = blocks.find_prefix(seq)
                needed = blocks.num_needed(seq, hits)
                num_to_come = max(needed) + self._growth(seq)
                if num_to_come > num_spare and not self._has_blocks(seq, hits, needed, budget):
                    return "blocks"
                num_spare -= num_to_come
                self._start(step, seq, hits)
            budget -= self._add_chunk(step, seq, budget)
            if self.num_computed[seq.row] < seq.prefill_end:
                return stopped_by
            seq = None
        return ""

    def _prompts(self, begun: Sequence | None, num_spare: int) -> Iterator[tuple[int, int]]:
        """(tokens still to compute, tokens) of the prompt that has begun, of the first waiting
        sequence, and of the sequences behind it that have a row and are sure to have blocks."""
        if begun is not None:
            yield begun.prefill_end - int(self.num_computed[begun.row]), begun.prefill_end
        for i, seq in enumerate(islice(self.waiting, len(self.free_rows))):
            hits = self.block_manager.find_prefix(seq)
            num_spare -= max(self.block_manager.num_needed(seq, hits)) + self._growth(seq)
            if i and num_spare < 0:
                return
            num_tokens = len(seq.token_ids)
            yield max(1, num_tokens - hits.shape[1] * self.block_manager.block_size), num_tokens

    def _growth(self, seq: Sequence) -> int:
        """Blocks that a sequence takes after its known tokens; the last token is never stored."""
        blocks_for = self.block_manager.blocks_for
        return blocks_for(seq.max_len - 1) - blocks_for(len(seq.token_ids))

    def _has_blocks(self, seq: Sequence, hits: np.ndarray, needed: list[int], budget: int) -> bool:
        """Whether a waiting sequence can run beside the running ones without a preemption until
        they end, as far as that can be known (docs/decisions/0010).

        Args:
            hits: what find_prefix found.
            needed: free blocks of each group that it would take now.
            budget: tokens that it may compute in this step.
        """
        blocks, num_known = self.block_manager, len(seq.token_ids)
        if any(n > len(pool.free_blocks) for n, pool in zip(needed, blocks.pools, strict=True)):
            return False
        rows = np.flatnonzero(self.max_len)
        num_tokens = np.append(self.num_computed[rows], num_known)
        num_steps = expected_steps(
            num_tokens,
            np.append(self.num_prompt_tokens[rows], seq.num_prompt_tokens),
            np.append(self.max_len[rows], seq.max_len),
            np.append(self.may_stop[rows], seq.may_stop),
            int(self.mean_output),
        )
        num_left = num_known - hits.shape[1] * blocks.block_size - budget
        if num_left > 0:  # while later steps compute its prompt, the others go on
            num_steps[-1] += MIXED_STEPS - -num_left // (self.max_num_batched_tokens - len(rows))
        for pool, shared, num_new in zip(blocks.pools, hits, needed, strict=True):
            num_owned = pool.num_owned(self.max_num_seqs, shared)[rows]
            num_staying = pool.num_blocks - len(pool.free_blocks) - int(num_owned.sum())
            peak = peak_blocks(
                num_tokens, num_steps, np.append(num_owned, num_new), blocks.block_size, pool.window
            )
            if num_staying + peak > pool.num_blocks:
                return not self.running
        return True

    def _start(self, step: ScheduledStep, seq: Sequence, hits: np.ndarray) -> None:
        """Move a waiting sequence to the running ones."""
        blocks, params = self.block_manager, seq.params
        del self.waiting[seq]
        self.running[seq] = None
        seq.row = row = heappop(self.free_rows)
        blocks.allocate(seq, hits)
        seq.prefill_end = len(seq.token_ids)
        if seq.logprobs is not None:
            self.logprobs.width = max(self.logprobs.width, seq.logprobs.width)
        # With every token cached the last one is computed again, for its logits; its block is
        # shared, so its keys and values aren't stored.
        num_cached_tokens = hits.shape[1] * blocks.block_size
        num_cached = min(num_cached_tokens, seq.prefill_end - 1)
        if seq.num_cached_tokens is None:
            seq.num_cached_tokens = num_cached
            seq.metrics.scheduled_time = seq.metrics.scheduled_time or time.monotonic()
        step.metrics.cached_tokens += num_cached
        self.seqs[row], self.max_len[row] = seq, seq.max_len
        self.num_prompt_tokens[row], self.may_stop[row] = seq.num_prompt_tokens, seq.may_stop
        self.num_computed[row] = num_cached
        self.num_slots[row] = len(seq.block_tables[0]) * blocks.block_size
        self.max_slots[row] = blocks.blocks_for(seq.max_len - 1) * blocks.block_size
        min_len = seq.num_prompt_tokens + params.min_tokens if params.min_tokens else 0
        step.input.starts.append(
            RowStart(
                row=row,
                num_cached_tokens=num_cached_tokens,
                params=params,
                seed=seq.seed,
                stop_token_ids=(*seq.eos_token_ids, *seq.stop_token_ids),
                min_len=min(min_len, seq.max_len),
                # Attention never reads the blocks before a window: any number will do.
                block_tables=tuple(np.maximum(t, np.int32(0)) for t in seq.block_tables),
                num_prompt_tokens=seq.num_prompt_tokens,
                token_ids=seq.token_ids[:] if params.needs_history else (),
            )
        )

    def _add_chunk(self, step: ScheduledStep, seq: Sequence, budget: int) -> int:
        """Compute as much of a sequence's prompt as the budget allows; returns how many tokens."""
        start = int(self.num_computed[seq.row])
        end = min(seq.prefill_end, start + budget)
        samples = end == seq.prefill_end
        step.input.chunks.append(Chunk(seq.row, start, seq.token_ids[start:end], samples))
        if seq.scores is not None:
            scoring = seq.scoring(len(step.input.chunks) - 1, start, end)
            if scoring.token_ids:
                step.input.scorings.append(scoring)
                step.scored.append(seq)
        self.num_computed[seq.row] = end
        if samples:
            step.sampled.append(seq)
            self.decodes[seq.row] = end + 1 < seq.max_len
        self.block_manager.register(seq, end)
        if self.block_manager.has_windows:
            self.block_manager.free_outside(seq, start)
        return end - start

    def _release(self, seq: Sequence) -> None:
        """Take back a running sequence's row and blocks. Its full blocks stay in the prefix cache
        until they are reused, also if their last token was read just now."""
        del self.running[seq]
        if seq.logprobs is not None:
            self.logprobs.take(seq)
        row = seq.row
        self.block_manager.register(seq, int(self.num_computed[row]))
        self.block_manager.free(seq)
        self.seqs[row], self.decodes[row] = None, False
        self.max_len[row] = self.num_computed[row] = 0
        self.num_slots[row] = self.max_slots[row] = 0
        heappush(self.free_rows, row)
        seq.row = -1
