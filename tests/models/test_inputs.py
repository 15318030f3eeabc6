"""StepInput -> ForwardBatch: slots, pages of reused rows, where decodes get their tokens."""

import torch

from nanovllm.ops.reference import TorchAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.step import RowStart, StepInput
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.upload import Uploader


def make_inputs(num_rows, max_blocks):
    uploader = Uploader(torch.device("cpu"))
    return InputBuilder(num_rows, max_blocks, 4, TorchAttention(), uploader)


def start(row, num_cached_tokens=0):
    return RowStart(row, num_cached_tokens, SamplingParams(), 0, (), 0)


def test_decodes_feed_on_their_rows_last_token_and_chunks_on_the_steps():
    inputs = make_inputs(3, max_blocks=4)
    inputs.keep_sampled(torch.tensor([2]), torch.tensor([77]))
    step = StepInput(starts=[start(2), start(0)], num_decodes=1, token_ids=[10, 11, 12])
    step.new_pages = [(2, 0, [5, 3]), (0, 0, [9, 1])]
    step.add(row=2, position=5, query_len=1, samples=True)
    step.add(row=0, position=2, query_len=3, samples=False)
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
    step = StepInput(starts=[start(0, num_cached_tokens=8)], token_ids=[10])
    step.new_pages = [(0, 0, [6, 7])]
    step.add(row=0, position=7, query_len=1, samples=True)  # a prompt of 8 tokens, all cached
    batch, rows = inputs.build(step)
    assert batch.slot_mapping.tolist() == [-1] and rows.tolist() == [0]


def test_a_reused_row_forgets_its_former_pages():
    inputs = make_inputs(2, max_blocks=4)
    first = StepInput(starts=[start(0), start(1)], token_ids=[1] * 26)
    first.new_pages = [(0, 0, [8, 9, 10, 11]), (1, 0, [1, 2, 3])]
    first.add(row=0, position=0, query_len=16, samples=True)
    first.add(row=1, position=0, query_len=10, samples=True)
    inputs.build(first)
    second = StepInput(starts=[start(0)], num_decodes=1, token_ids=[1] * 3)
    second.new_pages = [(0, 0, [5])]
    second.add(row=1, position=10, query_len=1, samples=True)
    second.add(row=0, position=0, query_len=3, samples=True)
    batch, _ = inputs.build(second)
    assert batch.block_tables[batch.rows, :3].tolist() == [[1, 2, 3], [5, 0, 0]]
