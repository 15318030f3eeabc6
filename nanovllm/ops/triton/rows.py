"""Kernels around a model's forward: from the rows' state to a step's inputs, and back.

The worker keeps a row of state for each sequence on the device (worker/rows.py); its inputs.py and
runner.py launch these two. Both read or write pinned memory of the host themselves: a copy engine
would be waited for by the kernels around it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nanovllm.ops.batch import RowState, StepColumns, StepTensors
from nanovllm.ops.triton.kernel_configs import ROWS_BLOCK, cdiv
from nanovllm.ops.triton.layers import pdl_options


@triton.jit
def _noise_keys(seed, position):
    """reference_rows.noise_keys."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 32).to(tl.int64), (x & 0xFFFFFFFF).to(tl.int64)


@triton.jit
def _begin_draws(
    index, ok, token, row, position, row_ints, row_floats, sampled_ints, noise_keys, sampled_floats,
    padding_row,
):  # fmt: skip
    """The inputs of sampled tokens, at these indices among them, each after a query token of a row
    at a position."""
    num_rows, num_sampled = padding_row + 1, padding_row  # at most
    first, second = _noise_keys(tl.load(row_ints + row, mask=ok, other=0), position + 1)
    top_k = tl.load(row_ints + num_rows + row, mask=ok, other=0)
    temperature = tl.load(row_floats + row, mask=ok, other=0.0)
    top_p = tl.load(row_floats + num_rows + row, mask=ok, other=1.0)
    min_p = tl.load(row_floats + 2 * num_rows + row, mask=ok, other=0.0)
    tl.store(sampled_ints + index, token.to(tl.int64), mask=ok)
    tl.store(sampled_ints + num_sampled + index, row.to(tl.int64), mask=ok)
    tl.store(sampled_ints + 2 * num_sampled + index, top_k, mask=ok)
    tl.store(noise_keys + 2 * index, first, mask=ok)
    tl.store(noise_keys + 2 * index + 1, second, mask=ok)
    tl.store(sampled_floats + index, temperature, mask=ok)
    tl.store(sampled_floats + num_sampled + index, top_p, mask=ok)
    tl.store(sampled_floats + 2 * num_sampled + index, min_p, mask=ok)


@triton.jit(
    do_not_specialize=["padding_row", "width", "group_stride", "table_stride", "token_stride"]
)
def begin_step_kernel(
    counts, columns, block_tables, last_tokens, row_ints, row_floats,
    token_ids, sampled_ints, noise_keys, sampled_floats, slot_out,
    padding_row, width, group_stride, table_stride, token_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK query tokens for one group of layers; for the first group it makes what
    the groups have in common, too. Pointers are to the first of the tensors of one memory, in the
    order of their classes in batch.py."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    num_tokens, size = tl.load(counts), tl.load(counts + 1)
    ok, is_token = i < size, i < num_tokens
    row = tl.load(columns + i, mask=is_token, other=padding_row)
    position = tl.load(columns + width + i, mask=is_token, other=0)
    stored = tl.load(columns + 4 * width + i, mask=is_token, other=0)
    opened = tl.load(columns + (5 + group) * width + i, mask=is_token, other=-1)
    entry = block_tables + group * group_stride + row.to(tl.int64) * table_stride
    entry += position // BLOCK_SIZE
    known = tl.load(entry, mask=is_token & (opened < 0), other=0)
    block = tl.where(opened >= 0, opened, known).to(tl.int64)
    tl.store(entry, opened, mask=opened >= 0)
    slot = tl.where(stored > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(token_ids + (2 + group) * token_stride + i, slot, mask=ok)
    if group == 0:
        token = tl.load(columns + 2 * width + i, mask=is_token, other=-1).to(tl.int64)
        last = tl.load(last_tokens + row, mask=ok & (token < 0), other=0)
        tl.store(token_ids + i, tl.where(token >= 0, token, last), mask=ok)
        tl.store(token_ids + token_stride + i, position.to(tl.int64), mask=ok)
        index = tl.load(columns + 3 * width + i, mask=is_token, other=-1)
        _begin_draws(
            index, index >= 0, i, row, position.to(tl.int64),
            row_ints, row_floats, sampled_ints, noise_keys, sampled_floats, padding_row,
        )  # fmt: skip
        # Padding of the sampled tokens: the padding row draws after the first token.
        is_padding = (i >= tl.load(counts + 2)) & (i < tl.load(counts + 3))
        first = tl.load(columns + width).to(tl.int64)
        _begin_draws(
            i, is_padding, i * 0, i * 0 + padding_row, i * 0 + first,
            row_ints, row_floats, sampled_ints, noise_keys, sampled_floats, padding_row,
        )  # fmt: skip
        tl.store(slot_out, tl.load(counts + 4))
        tl.store(slot_out + 1, tl.load(counts + 5))


def begin_step(
    columns: StepColumns, state: RowState, out: StepTensors, block_size: int, max_tokens: int
) -> None:
    """As reference_rows.begin_step. (A launch takes Python some time for each argument: the first
    tensor of a memory stands for the others.)"""
    tables, draws = state.block_tables, out.draws
    begin_step_kernel[(cdiv(max_tokens, ROWS_BLOCK), len(tables))](
        columns.counts, columns.row, tables, state.last_tokens, state.seed, state.temperature,
        out.token_ids, out.sampled_tokens, draws.noise_keys, draws.temperature, out.slot,
        tables.shape[1] - 1, columns.block.stride(0), tables.stride(0), tables.stride(1),
        out.slot_mapping.stride(0), BLOCK_SIZE=block_size, BLOCK=ROWS_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "stride"])
def keep_sampled_kernel(
    last_tokens, host_tokens, rows, token_ids, slot, num_rows, stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < num_rows
    row = tl.load(rows + i, mask=ok, other=0)
    to_host = host_tokens + tl.load(slot) * stride
    if PDL:
        gdc_wait()
    token = tl.load(token_ids + i, mask=ok, other=0)
    tl.store(last_tokens + row, token, mask=ok)
    tl.store(to_host + i, token, mask=ok)


def keep_sampled(
    last_tokens: torch.Tensor,
    host_tokens: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    slot: torch.Tensor,
) -> None:
    """As reference_rows.keep_sampled."""
    if len(rows):
        keep_sampled_kernel[(cdiv(len(rows), ROWS_BLOCK),)](
            last_tokens, host_tokens, rows, token_ids, slot, len(rows), host_tokens.stride(0),
            BLOCK=ROWS_BLOCK, num_warps=4, **pdl_options(last_tokens.device),
        )  # fmt: skip
