"""StepInput -> ForwardBatch: the one builder of a step's inputs.

The runner calls it once a step. The host writes what the step says of each query token into the
columns of the step's record; ops.begin_step makes the batch of them and of the rows' state, on the
device. Attention backends add arrays of their own, which serve on while the decodes are the same.
"""

from typing import NamedTuple

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.ops.batch import Attention, BatchGroup, Draws, ForwardBatch, Queries, StepTensors
from nanovllm.worker.record import StepRecord
from nanovllm.worker.rows import Rows


class StepShape(NamedTuple):
    """What a forward is told by the host: with the names of attention's arrays, all that a CUDA
    graph cannot read from memory.

    Attributes:
        num_tokens, num_sampled: query tokens and sampled tokens, padding included.
        gathers: whether sampled tokens come after some query tokens only, or after all of them.
        limited: whether top_k, top_p or min_p limit a row's draws.
        is_decode, max_query_len: as in ForwardBatch.
    """

    num_tokens: int
    num_sampled: int
    gathers: bool = False
    limited: bool = False
    is_decode: bool = True
    max_query_len: int = 1


class InputBuilder:
    """Builds each step's batch.

    Args:
        rows: the rows' state.
        attentions: the backend of each group of layers.
        block_size: tokens per block.
        max_tokens: query tokens of the largest step.

    Attributes:
        tensors: what ops.begin_step has written.
        listed, list_age: the decodes and the graph's size that attention's arrays were made for,
            and for how many steps they have served; 0: they serve no other step.
    """

    def __init__(
        self, rows: Rows, attentions: tuple[Attention, ...], block_size: int, max_tokens: int
    ):
        self.rows, self.attentions, self.block_size = rows, attentions, block_size
        self.tensors = step_tensors(rows, len(attentions), max_tokens)
        self.numbers = np.arange(max_tokens, dtype=np.int32)
        self.steps_per_list = min(attention.steps_per_list for attention in attentions)
        self.arrays: dict[str, np.ndarray] = {}
        self.listed: tuple[np.ndarray, int | None] = np.empty(0), None
        self.list_age = 0

    def begin(
        self, step: StepInput, record: StepRecord, size: int | None = None
    ) -> dict[str, np.ndarray]:
        """Have the device make a step's tensors, and say what attention needs beside them.

        Args:
            size: tokens with padding, of a CUDA graph; None: there is no padding.

        Returns: arrays for the device; the same dict as for the step before if they serve on.
        """
        num_decodes, columns = step.num_decodes, record.arrays
        for table, blocks in zip(self.rows.block_tables, step.decode_blocks, strict=True):
            opens = np.flatnonzero(blocks >= 0)
            if opens.size:
                index = step.decode_positions[opens] // self.block_size
                table[step.decode_rows[opens], index] = blocks[opens]
        columns.row[:num_decodes] = step.decode_rows
        columns.position[:num_decodes] = step.decode_positions
        columns.token[:num_decodes] = -1
        columns.sampled[:num_decodes] = self.numbers[:num_decodes]
        columns.stored[:num_decodes] = 1
        columns.block[:, :num_decodes] = step.decode_blocks
        num_tokens = record.num_tokens = record.num_sampled = num_decodes
        if step.chunks:
            num_tokens = self._add_chunks(step, record)
        rows, listed_size = self.listed
        if (
            step.chunks
            or not 0 < self.list_age < self.steps_per_list
            or size != listed_size
            or not np.array_equal(step.decode_rows, rows)
        ):
            self.arrays, self.list_age = self._attention_arrays(step, size), 0
            self.listed = step.decode_rows, size
        num_padded, num_drawn = num_tokens, record.num_sampled
        if size is not None:
            num_padded, num_drawn = size, min(size, self.rows.padding_row)
        columns.counts[:] = (
            num_tokens, num_padded, record.num_sampled, num_drawn, record.slot, self.list_age,
        )  # fmt: skip
        ops.begin_step(record.columns, self.rows.state, self.tensors, self.block_size, num_padded)
        self.list_age = 0 if step.chunks else self.list_age + 1
        return self.arrays

    def _add_chunks(self, step: StepInput, record: StepRecord) -> int:
        """Write the columns of chunks, behind the decodes'. Returns the number of tokens."""
        columns, chunks, num_decodes = record.arrays, step.chunks, step.num_decodes
        lens = np.array([len(chunk.token_ids) for chunk in chunks])
        ends = num_decodes + lens.cumsum()
        num_tokens = record.num_tokens = int(ends[-1])
        tokens = slice(num_decodes, num_tokens)
        rows = np.repeat([chunk.row for chunk in chunks], lens)
        before = np.repeat([chunk.position for chunk in chunks] - (ends - lens), lens)
        columns.row[tokens] = rows
        columns.position[tokens] = self.numbers[tokens] + before
        columns.token[tokens] = np.concatenate([chunk.token_ids for chunk in chunks])
        columns.stored[tokens] = columns.position[tokens] >= self.rows.num_cached_tokens[rows]
        columns.block[:, tokens] = columns.sampled[tokens] = -1
        last = ends[[chunk.samples for chunk in chunks]] - 1
        record.num_sampled = num_decodes + len(last)
        columns.sampled[last] = self.numbers[num_decodes : record.num_sampled]
        return num_tokens

    def _attention_arrays(self, step: StepInput, size: int | None) -> dict[str, np.ndarray]:
        rows, query_lens = step.rows, step.query_lens
        query_start = np.concatenate(([0], query_lens.cumsum()))
        context_lens = step.positions + query_lens
        arrays: dict[str, np.ndarray] = {}
        for group, attention in enumerate(self.attentions):
            table = self.rows.block_tables[group]
            lens = query_start, query_lens, context_lens, step.num_decodes
            of_group = attention.host_arrays(Queries(table, rows, *lens, size))
            arrays |= {f"{group}.{name}": array for name, array in of_group.items()}
        return arrays

    def batch(self, shape: StepShape, arrays: dict[str, torch.Tensor]) -> ForwardBatch:
        """The batch of the step that began last, whose arrays have been uploaded."""
        size, tensors = shape.num_tokens, self.tensors
        groups = []
        for group, attention in enumerate(self.attentions):
            own = {"list_age": tensors.list_age}
            for name, array in arrays.items():
                of_group, _, own_name = name.partition(".")
                if of_group == str(group):
                    own[own_name] = array
            table = self.rows.state.block_tables[group]
            groups.append(BatchGroup(table, tensors.slot_mapping[group, :size], attention, own))
        token_ids, positions = tensors.token_ids[:size], tensors.positions[:size]
        lens = shape.max_query_len, shape.is_decode
        return ForwardBatch(token_ids, positions, tuple(groups), *lens)


def step_tensors(rows: Rows, num_groups: int, max_tokens: int) -> StepTensors:
    """Memory for ops.begin_step."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=rows.device)

    max_sampled = rows.padding_row
    tokens = zeros(2 + num_groups, -(-max_tokens // 2) * 2)  # all aligned
    sampled_tokens, sampled_rows, top_k = zeros(3, max_sampled)
    temperature, top_p, min_p = zeros(3, max_sampled, dtype=torch.float32)
    slot, list_age = zeros(2, dtype=torch.int32).split(1)
    draws = Draws(temperature, zeros(max_sampled, 2), top_k, top_p, min_p)
    sampled = sampled_tokens, sampled_rows, draws
    return StepTensors(tokens[0], tokens[1], tokens[2:], *sampled, slot, list_age)
