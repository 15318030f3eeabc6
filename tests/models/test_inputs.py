"""StepInput -> ForwardBatch: slots, blocks of reused rows, where decodes get their tokens."""

import numpy as np
import torch
from nanovllm.worker.upload import Uploader

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.ops.reference import TorchAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import InputBuilder


def make_inputs(num_rows, max_blocks):
    uploader = Uploader(torch.device("cpu"))
    return InputBuilder(num_rows, num_rows, max_blocks, 4, TorchAttention(), uploader, {})


def start(row, block_table, num_cached_tokens=0):
    table = np.array(block_table, np.int32)
    return RowStart(row, num_cached_tokens, SamplingParams(), 0, (), 0, (table,))


def make_step(starts, chunks, decodes=()):
    """Decodes as (row, position, block)."""
    rows, positions, pages = np.array(decodes, np.int64).reshape(-1, 3).T
    return StepInput(starts, rows, positions, pages.astype(np.int32)[None], chunks)


def test_decodes_feed_on_their_rows_last_token_and_chunks_on_the_steps():
    inputs = make_inputs(3, max_blocks=4)
    turn = torch.tensor([0], dtype=torch.int32)
    inputs.keep_sampled(torch.tensor([2]), torch.tensor([77]), turn)
    step = make_step(
        [start(2, [5, 3]), start(0, [9, 1])],
        [Chunk(row=0, position=2, token_ids=[10, 11, 12], samples=False)],
        decodes=[(2, 5, -1)],
    )
    batch, _ = inputs.build(step)
    assert batch.token_ids.tolist() == [77, 10, 11, 12]
    assert batch.positions.tolist() == [5, 2, 3, 4]
    assert batch.slot_mapping.tolist() == [3 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 1 * 4 + 0]
    assert batch.block_tables[batch.rows, :2].tolist() == [[5, 3], [9, 1]]
    assert batch.query_start.tolist() == [0, 1, 4]
    assert batch.context_lens.tolist() == [6, 5]
    assert (batch.num_decodes, batch.max_query_len) == (1, 3)
    assert batch.logits_indices.tolist() == [0]


def test_tokens_in_shared_pages_are_not_stored_again():
    inputs = make_inputs(1, max_blocks=2)
    last = Chunk(row=0, position=7, token_ids=[10], samples=True)  # of 8 tokens, all cached
    step = make_step([start(0, [6, 7], num_cached_tokens=8)], [last])
    batch, tensors = inputs.build(step)
    assert batch.slot_mapping.tolist() == [-1] and tensors["sampled_rows"].tolist() == [0]


def test_a_reused_row_forgets_its_former_pages():
    inputs = make_inputs(2, max_blocks=4)
    chunks = [Chunk(0, 0, [1] * 16, samples=True), Chunk(1, 0, [1] * 10, samples=True)]
    inputs.build(make_step([start(0, [8, 9, 10, 11]), start(1, [1, 2, 3])], chunks))
    chunks = [Chunk(0, 0, [1] * 3, samples=True)]
    batch, _ = inputs.build(make_step([start(0, [5])], chunks, decodes=[(1, 10, -1)]))
    assert batch.block_tables[batch.rows, :3].tolist() == [[1, 2, 3], [5, 0, 0]]


def test_decodes_open_pages_where_their_positions_say():
    inputs = make_inputs(3, max_blocks=3)
    chunks = [Chunk(row, 0, [1] * n, samples=True) for row, n in ((0, 4), (1, 6), (2, 8))]
    inputs.build(make_step([start(0, [9]), start(1, [4, 5]), start(2, [1, 2])], chunks))
    decodes = [(0, 4, 7), (1, 6, -1), (2, 8, 3)]
    batch, _ = inputs.build(make_step([], [], decodes))
    assert batch.block_tables[batch.rows].tolist() == [[9, 7, 0], [4, 5, 0], [1, 2, 3]]
    assert batch.slot_mapping.tolist() == [7 * 4, 5 * 4 + 2, 3 * 4]
