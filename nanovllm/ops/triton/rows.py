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
def _begin_draw(
    at, ok, token, row, drawn, seed_of, top_k_of, temperature_of, top_p_of, min_p_of,
    sampled_tokens, rows, temperature, noise_keys, top_k, top_p, min_p,
):  # fmt: skip
    """The inputs of sampled tokens, at these indices among them."""
    first, second = _noise_keys(tl.load(seed_of + row, mask=ok, other=0), drawn)
    tl.store(sampled_tokens + at, token.to(tl.int64), mask=ok)
    tl.store(rows + at, row.to(tl.int64), mask=ok)
    tl.store(noise_keys + 2 * at, first, mask=ok)
    tl.store(noise_keys + 2 * at + 1, second, mask=ok)
    tl.store(temperature + at, tl.load(temperature_of + row, mask=ok, other=0.0), mask=ok)
    tl.store(top_k + at, tl.load(top_k_of + row, mask=ok, other=0), mask=ok)
    tl.store(top_p + at, tl.load(top_p_of + row, mask=ok, other=1.0), mask=ok)
    tl.store(min_p + at, tl.load(min_p_of + row, mask=ok, other=0.0), mask=ok)


@triton.jit(
    do_not_specialize=["padding_row", "block_stride", "group_stride", "table_stride", "slot_stride"]
)
def begin_step_kernel(
    counts, row_of, position_of, token_of, sampled_of, stored_of, block_of,
    block_tables, last_tokens, seed_of, top_k_of, temperature_of, top_p_of, min_p_of,
    token_ids, positions, slot_mapping, sampled_tokens, rows,
    temperature, noise_keys, top_k, top_p, min_p, slot_out, list_age_out,
    padding_row, block_stride, group_stride, table_stride, slot_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes BLOCK query tokens for one group of layers; for the first group it makes what
    the groups have in common, too."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(1).to(tl.int64)
    num_tokens, size = tl.load(counts), tl.load(counts + 1)
    ok, is_token = i < size, i < num_tokens
    row = tl.load(row_of + i, mask=is_token, other=padding_row)
    position = tl.load(position_of + i, mask=is_token, other=0)
    opened = tl.load(block_of + group * block_stride + i, mask=is_token, other=-1)
    stored = tl.load(stored_of + i, mask=is_token, other=0)
    table = block_tables + group * group_stride
    entry = table + row.to(tl.int64) * table_stride + position // BLOCK_SIZE
    known = tl.load(entry, mask=is_token & (opened < 0), other=0)
    block = tl.where(opened >= 0, opened, known).to(tl.int64)
    tl.store(entry, opened, mask=opened >= 0)
    slot = tl.where(stored > 0, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slot_mapping + group * slot_stride + i, slot, mask=ok)
    if group == 0:
        token = tl.load(token_of + i, mask=is_token, other=-1).to(tl.int64)
        last = tl.load(last_tokens + row, mask=ok & (token < 0), other=0)
        tl.store(token_ids + i, tl.where(token >= 0, token, last), mask=ok)
        tl.store(positions + i, position.to(tl.int64), mask=ok)
        at = tl.load(sampled_of + i, mask=is_token, other=-1)
        drawn = (position + 1).to(tl.int64)  # the place of the token that will be
        _begin_draw(
            at, at >= 0, i, row, drawn, seed_of, top_k_of, temperature_of, top_p_of, min_p_of,
            sampled_tokens, rows, temperature, noise_keys, top_k, top_p, min_p,
        )  # fmt: skip
        # Padding of the sampled tokens: the padding row draws after the first token.
        is_padding = (i >= tl.load(counts + 2)) & (i < tl.load(counts + 3))
        first = tl.load(position_of).to(tl.int64)
        _begin_draw(
            i, is_padding, i * 0, i * 0 + padding_row, i * 0 + first + 1,
            seed_of, top_k_of, temperature_of, top_p_of, min_p_of,
            sampled_tokens, rows, temperature, noise_keys, top_k, top_p, min_p,
        )  # fmt: skip
        tl.store(slot_out, tl.load(counts + 4))
        tl.store(list_age_out, tl.load(counts + 5))


def begin_step(
    columns: StepColumns, state: RowState, out: StepTensors, block_size: int, max_tokens: int
) -> None:
    """As reference_rows.begin_step. All that differs from step to step lies in memory, so a CUDA
    graph can hold it."""
    tables, block, slots = state.block_tables, columns.block, out.slot_mapping
    begin_step_kernel[(cdiv(max_tokens, ROWS_BLOCK), len(tables))](
        *columns, *state, out.token_ids, out.positions, slots, out.sampled_tokens, out.rows,
        *out.draws, out.slot, out.list_age, tables.shape[1] - 1, block.stride(0),
        tables.stride(0), tables.stride(1), slots.stride(0),
        BLOCK_SIZE=block_size, BLOCK=ROWS_BLOCK, num_warps=4,
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
