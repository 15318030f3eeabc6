"""Kernels around a model's forward: from the rows' state to a step's inputs, and back.

The worker keeps a row of state for each sequence on the device (worker/inputs.py). Both kernels
read or write page-locked memory of the host themselves: a copy engine would be waited for by the
kernels around it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nanovllm.ops.triton.kernel_configs import ROWS_BLOCK, cdiv
from nanovllm.ops.triton.layers import pdl_options


@triton.jit
def _noise_keys(seed, position):
    """worker.sampler.noise_keys."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 32).to(tl.int64), (x & 0xFFFFFFFF).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows", "width", "table_stride"])
def begin_step_kernel(
    lines, block_tables, last_tokens, temperature_of, seed_of,
    rows, positions, context_lens, slot_mapping, token_ids, temperature, noise_keys, turn_out,
    list_age_out, num_rows, width, table_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK tokens of a batch that is padded to `size` with the last row's."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_tokens, size = tl.load(lines), tl.load(lines + 1)
    ok, is_token = i < size, i < num_tokens
    row = tl.load(lines + width + i, mask=is_token, other=num_rows)
    is_drawn = row >= 0  # from its logits
    row = tl.where(is_drawn, row, ~row)
    position = tl.load(lines + 2 * width + i, mask=is_token, other=0)
    opened = tl.load(lines + 3 * width + i, mask=is_token, other=-1)
    known = tl.load(lines + 4 * width + i, mask=is_token, other=-1)
    entry = block_tables + row * table_stride + position // BLOCK_SIZE
    page = tl.where(opened >= 0, opened, tl.load(entry, mask=is_token, other=0).to(tl.int64))
    tl.store(entry, page.to(tl.int32), mask=opened >= 0)
    is_stored = is_token & (opened >= -1)
    slot = tl.where(is_stored, page * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    token = tl.where(known >= 0, known, tl.load(last_tokens + row, mask=ok, other=0))
    drawn = position + 1  # the place of the token that will be
    first, second = _noise_keys(tl.load(seed_of + row, mask=ok, other=0), drawn)
    tl.store(rows + i, tl.where(is_drawn, row, num_rows), mask=ok)
    tl.store(positions + i, position, mask=ok)
    tl.store(context_lens + i, (position + 1).to(tl.int32), mask=ok)
    tl.store(slot_mapping + i, slot, mask=ok)
    tl.store(token_ids + i, token, mask=ok)
    tl.store(temperature + i, tl.load(temperature_of + row, mask=ok, other=0.0), mask=ok)
    tl.store(noise_keys + 2 * i, first, mask=ok)
    tl.store(noise_keys + 2 * i + 1, second, mask=ok)
    tl.store(turn_out, tl.load(lines + 2).to(tl.int32))
    tl.store(list_age_out, tl.load(lines + 3).to(tl.int32))


def begin_step(
    lines: torch.Tensor,
    state: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    block_size: int,
) -> None:
    """The inputs of a step, from what the engine says and the rows' state; pages that decodes open
    go to their block tables. All that differs from step to step lies in memory, so a CUDA graph
    can hold it.

    Args:
        lines: [5, at least 4] int64 in page-locked memory. First how many tokens there are, the
            size that they are padded to, turn and list_age; then of each token
            - its row; where nothing is drawn from its logits, -1 - row,
            - its position,
            - the page that it opens; -1: none; -2: its key and value are there already,
            - the token; -1: the one that was drawn last for the row.
        state: of all rows: block_tables, last_tokens, temperature, seed.
        inputs: written: the first `size` elements of rows, positions, context_lens, slot_mapping,
            token_ids (as in ForwardBatch, every token by itself), temperature, noise_keys (as
            ops.sample takes them); turn and list_age, [1] int32. Beyond the tokens they are those
            of the last row, which is no sequence's. It is also what `rows` has where nothing is
            drawn: whose block table a token reads, the work list of attention knows.
    """
    tables = state["block_tables"]
    num_rows = len(tables) - 1
    begin_step_kernel[(cdiv(len(inputs["rows"]), ROWS_BLOCK),)](
        lines, tables, state["last_tokens"], state["temperature"], state["seed"],
        inputs["rows"], inputs["positions"], inputs["context_lens"], inputs["slot_mapping"],
        inputs["token_ids"], inputs["temperature"], inputs["noise_keys"], inputs["turn"],
        inputs["list_age"], num_rows, lines.stride(0), tables.stride(0),
        BLOCK_SIZE=block_size, BLOCK=ROWS_BLOCK, num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "stride"])
def keep_sampled_kernel(
    last_tokens, host_tokens, rows, token_ids, turn, num_rows, stride,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < num_rows
    row = tl.load(rows + i, mask=ok, other=0)
    to_host = host_tokens + tl.load(turn) * stride
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
    turn: torch.Tensor,
) -> None:
    """As reference.keep_sampled; host_tokens is page-locked."""
    if len(rows):
        keep_sampled_kernel[(cdiv(len(rows), ROWS_BLOCK),)](
            last_tokens, host_tokens, rows, token_ids, turn, len(rows), host_tokens.stride(0),
            BLOCK=ROWS_BLOCK, num_warps=4, **pdl_options(last_tokens.device),
        )  # fmt: skip
