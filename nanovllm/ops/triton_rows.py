"""Kernels around a model's forward: from the rows' state to a step's inputs, and back.

The worker keeps a row of state for each sequence on the device (worker/inputs.py). Both kernels
read or write page-locked memory of the host themselves: a copy engine would be waited for by the
kernels around it.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nanovllm.ops.kernel_configs import ROWS_BLOCK, cdiv
from nanovllm.ops.triton_ops import pdl_options


@triton.jit
def _noise_keys(seed, position):
    """worker.sampler.noise_keys."""
    x = seed.to(tl.uint64) + (position + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return (x >> 32).to(tl.int64), (x & 0xFFFFFFFF).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows", "width", "table_stride"])
def begin_decode_kernel(
    decodes, block_tables, last_tokens, temperature_of, seed_of,
    rows, positions, context_lens, slot_mapping, token_ids, temperature, noise_keys, turn_out,
    list_age_out, num_rows, width, table_stride, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program does BLOCK decodes of a batch that is padded to `size` with the last row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_decodes, size = tl.load(decodes), tl.load(decodes + 1)
    ok, is_decode = i < size, i < num_decodes
    row = tl.load(decodes + width + i, mask=is_decode, other=num_rows)
    position = tl.load(decodes + 2 * width + i, mask=is_decode, other=0)
    opened = tl.load(decodes + 3 * width + i, mask=is_decode, other=-1)
    entry = block_tables + row * table_stride + position // BLOCK_SIZE
    page = tl.where(opened >= 0, opened, tl.load(entry, mask=is_decode, other=0).to(tl.int64))
    tl.store(entry, page.to(tl.int32), mask=opened >= 0)
    slot = tl.where(is_decode, page * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    drawn = position + 1  # the place of the token that will be
    first, second = _noise_keys(tl.load(seed_of + row, mask=ok, other=0), drawn)
    tl.store(rows + i, row, mask=ok)
    tl.store(positions + i, position, mask=ok)
    tl.store(context_lens + i, (position + 1).to(tl.int32), mask=ok)
    tl.store(slot_mapping + i, slot, mask=ok)
    tl.store(token_ids + i, tl.load(last_tokens + row, mask=ok, other=0), mask=ok)
    tl.store(temperature + i, tl.load(temperature_of + row, mask=ok, other=0.0), mask=ok)
    tl.store(noise_keys + 2 * i, first, mask=ok)
    tl.store(noise_keys + 2 * i + 1, second, mask=ok)
    tl.store(turn_out, tl.load(decodes + 2).to(tl.int32))
    tl.store(list_age_out, tl.load(decodes + 3).to(tl.int32))


def begin_decode(
    decodes: torch.Tensor,
    state: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    block_size: int,
) -> None:
    """The inputs of a step of decodes, from what the engine says and the rows' state; pages that
    decodes open go to their block tables. All that differs from step to step lies in memory, so a
    CUDA graph can hold it.

    Args:
        decodes: [4, at least 4, and rows but for the last] int64 in page-locked memory. First how
            many decodes there are, the size that they are padded to, turn and list_age; then of
            each decode its row, its position, and the page that it opens or -1.
        state: of all rows: block_tables, last_tokens, temperature, seed.
        inputs: written: the first `size` elements of rows, positions, context_lens, slot_mapping,
            token_ids (as in ForwardBatch), temperature, noise_keys (as ops.sample takes them);
            turn and list_age, [1] int32. Beyond the decodes they are those of the last row, which
            is no sequence's.
    """
    tables = state["block_tables"]
    num_rows = len(tables) - 1
    begin_decode_kernel[(cdiv(num_rows, ROWS_BLOCK),)](
        decodes, tables, state["last_tokens"], state["temperature"], state["seed"],
        inputs["rows"], inputs["positions"], inputs["context_lens"], inputs["slot_mapping"],
        inputs["token_ids"], inputs["temperature"], inputs["noise_keys"], inputs["turn"],
        inputs["list_age"], num_rows, decodes.stride(0), tables.stride(0),
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
