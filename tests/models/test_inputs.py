"""StepInput -> ForwardBatch: slots, blocks of reused rows, where decodes get their tokens."""

import numpy as np
import torch

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.ops.reference_attention import TorchAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import InputBuilder, StepShape
from nanovllm.worker.record import make_records
from nanovllm.worker.rows import Rows

CPU = torch.device("cpu")


class Inputs:
    """An InputBuilder with all that it needs.

    Attributes:
        record: the last step's.
    """

    def __init__(self, num_rows, max_blocks, num_groups=1, block_size=4):
        self.rows = Rows(num_rows, num_groups, max_blocks, 100, CPU)
        self.records, self.host_tokens = make_records(num_rows, num_groups, 50, CPU)
        attentions = tuple(TorchAttention() for _ in range(num_groups))
        self.builder = InputBuilder(self.rows, attentions, block_size, 50)

    def build(self, step):
        self.record = self.records[0]
        self.record.begin()
        self.rows.start(step.starts, self.record)
        arrays = self.record.upload(self.builder.begin(step, self.record))
        return self.builder.batch(StepShape(self.record.num_tokens, 0), arrays)


def start(row, *block_tables, num_cached_tokens=0):
    tables = tuple(np.array(table, np.int32) for table in block_tables)
    return RowStart(row, num_cached_tokens, SamplingParams(), 0, (), 0, tables)


def make_step(starts, chunks, decodes=()):
    """Decodes as (row, position, block)."""
    rows, positions, blocks = np.array(decodes, np.int64).reshape(-1, 3).T
    return StepInput(starts, rows, positions, blocks.astype(np.int32)[None], chunks)


def test_decodes_feed_on_their_rows_last_token_and_chunks_on_the_steps():
    inputs = Inputs(3, max_blocks=4)
    inputs.rows.state.last_tokens[2] = 77
    step = make_step(
        [start(2, [5, 3]), start(0, [9, 1])],
        [Chunk(row=0, position=2, token_ids=[10, 11, 12], samples=False)],
        decodes=[(2, 5, -1)],
    )
    batch = inputs.build(step)
    assert batch.token_ids.tolist() == [77, 10, 11, 12]
    assert batch.positions.tolist() == [5, 2, 3, 4]
    [group] = batch.groups
    assert group.slot_mapping.tolist() == [3 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 1 * 4 + 0]
    assert group.block_tables[[2, 0], :2].tolist() == [[5, 3], [9, 1]]
    assert group.arrays["rows"].tolist() == [2, 0]
    assert group.arrays["query_start"].tolist() == [0, 1, 4]
    assert group.arrays["context_lens"].tolist() == [6, 5]
    assert inputs.record.num_sampled == 1
    tensors = inputs.builder.tensors
    assert tensors.rows[0] == 2 and tensors.sampled_tokens[0] == 0


def test_sampled_tokens_come_in_the_order_of_their_sequences():
    inputs = Inputs(4, max_blocks=4)
    chunks = [
        Chunk(0, 0, [1] * 5, samples=True),
        Chunk(3, 0, [1] * 3, samples=False),
        Chunk(1, 0, [1] * 2, samples=True),
    ]
    starts = [start(row, [2 * row, 2 * row + 1]) for row in (0, 3, 1)]
    inputs.build(make_step(starts, chunks, decodes=[(2, 3, -1)]))
    tensors, n = inputs.builder.tensors, inputs.record.num_sampled
    assert tensors.sampled_tokens[:n].tolist() == [0, 5, 10]
    assert tensors.rows[:n].tolist() == [2, 0, 1]


def test_tokens_in_shared_blocks_are_not_stored_again():
    inputs = Inputs(1, max_blocks=2)
    last = Chunk(row=0, position=7, token_ids=[10], samples=True)  # of 8 tokens, all cached
    batch = inputs.build(make_step([start(0, [6, 7], num_cached_tokens=8)], [last]))
    assert batch.groups[0].slot_mapping.tolist() == [-1]
    assert inputs.builder.tensors.rows[0] == 0 and inputs.record.num_sampled == 1


def test_a_reused_row_has_its_new_blocks():
    inputs = Inputs(2, max_blocks=4)
    chunks = [Chunk(0, 0, [1] * 16, samples=True), Chunk(1, 0, [1] * 10, samples=True)]
    inputs.build(make_step([start(0, [8, 9, 10, 11]), start(1, [1, 2, 3])], chunks))
    chunks = [Chunk(0, 0, [1] * 3, samples=True)]
    batch = inputs.build(make_step([start(0, [5])], chunks, decodes=[(1, 10, -1)]))
    assert batch.groups[0].slot_mapping.tolist() == [3 * 4 + 2, 20, 21, 22]


def test_decodes_open_blocks_where_their_positions_say():
    inputs = Inputs(3, max_blocks=3)
    chunks = [Chunk(row, 0, [1] * n, samples=True) for row, n in ((0, 4), (1, 6), (2, 8))]
    inputs.build(make_step([start(0, [9]), start(1, [4, 5]), start(2, [1, 2])], chunks))
    decodes = [(0, 4, 7), (1, 6, -1), (2, 8, 3)]
    [group] = inputs.build(make_step([], [], decodes)).groups
    assert group.block_tables[:3].tolist() == [[9, 7, 0], [4, 5, 0], [1, 2, 3]]
    assert group.slot_mapping.tolist() == [7 * 4, 5 * 4 + 2, 3 * 4]


def test_groups_of_layers_have_blocks_of_their_own():
    inputs = Inputs(2, max_blocks=3, num_groups=2)
    starts = [start(0, [9], [3]), start(1, [4, 5], [7, 8])]
    chunks = [Chunk(0, 0, [1] * 4, samples=True), Chunk(1, 5, [1], samples=True)]
    batch = inputs.build(StepInput(starts, decode_blocks=np.empty((2, 0), np.int32), chunks=chunks))
    assert [group.slot_mapping.tolist() for group in batch.groups] == [
        [36, 37, 38, 39, 5 * 4 + 1],
        [12, 13, 14, 15, 8 * 4 + 1],
    ]
    blocks = np.array([[7, -1], [2, -1]], np.int32)
    step = StepInput([], np.arange(2), np.array([4, 6]), blocks)
    batch = inputs.build(step)
    slots = [group.slot_mapping.tolist() for group in batch.groups]
    assert slots == [[28, 22], [8, 34]]
    assert [group.block_tables[0, 1] for group in batch.groups] == [7, 2]
