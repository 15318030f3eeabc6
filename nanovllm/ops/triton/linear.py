"""Matrix products on a GPU; quantization/weight_format.py calls them.

With few rows of input a product is as fast as its weight is read: gemv_kernel streams the weight
once, normalises the input on the way in, and gates or adds on the way out. With more rows norm and
gate are kernels of their own (layers.py), and the product is cuBLAS's.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.ops.triton.kernel_configs import (
    cdiv,
    gemv_config,
    max_gemv_rows,
    next_power_of_2,
)
from nanovllm.ops.triton.layers import pdl_options


@triton.jit
def gemv_kernel(
    out, x, weight, bias, norm_weight, eps,
    ROWS: tl.constexpr, PADDED_ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    NORM: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program computes BLOCK_N outputs of every row.

    Args:
        out: [ROWS, N]; with ADD it is added to.
        x: [ROWS, K].
        weight: [N, K]; with GATED [2N, K], gate before up.
        bias: [N]; with GATED [2N].
        norm_weight: [K].
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, PADDED_ROWS)
    ks = tl.arange(0, BLOCK_K)
    cols_ok = cols < N
    w_ptrs = weight + cols[:, None].to(tl.int64) * K + ks[None, :]
    total = tl.zeros([BLOCK_N, PADDED_ROWS], tl.float32)
    total_up = tl.zeros([BLOCK_N, PADDED_ROWS], tl.float32)
    squares = tl.zeros([PADDED_ROWS], tl.float32)
    out_ptrs = out + rows[None, :] * N + cols[:, None]
    out_ok = (rows < ROWS)[None, :] & cols_ok[:, None]
    for k in tl.static_range(0, K, BLOCK_K):
        # Weights come before the wait for the kernel whose output x is: they stream meanwhile.
        k_ok = ks < K - k
        ok = cols_ok[:, None] & k_ok[None, :]
        w = tl.load(w_ptrs + k, mask=ok, other=0.0)
        if GATED:
            w_up = tl.load(w_ptrs + N * K + k, mask=ok, other=0.0)
        if NORM:
            scale = tl.load(norm_weight + k + ks, mask=k_ok, other=0.0).to(tl.float32)
        if PDL and k == 0:
            gdc_launch_dependents()
            gdc_wait()
        if ADD and k == 0:
            # Not after the sums, for which warps wait for each other.
            added = tl.load(out_ptrs, mask=out_ok, other=0.0)
        for row in tl.static_range(ROWS):
            value = tl.load(x + row * K + k + ks, mask=k_ok, other=0.0).to(tl.float32)
            here = rows == row
            if NORM:
                squares += tl.where(here, tl.sum(value * value, 0), 0.0)
                value *= scale
            total += tl.where(here[None, :], tl.sum(w * value[None, :], 1)[:, None], 0.0)
            if GATED:
                part = tl.sum(w_up * value[None, :], 1)
                total_up += tl.where(here[None, :], part[:, None], 0.0)
    if NORM:
        # The norm's factor is the row's alone, so it can follow the product.
        factor = tl.rsqrt(squares / K + eps)[None, :]
        total *= factor
        total_up *= factor
    if BIAS:
        total += tl.load(bias + cols, mask=cols_ok, other=0.0).to(tl.float32)[:, None]
        if GATED:
            total_up += tl.load(bias + N + cols, mask=cols_ok, other=0.0).to(tl.float32)[:, None]
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    if ADD:
        total += added.to(tl.float32)
    tl.store(out_ptrs, total, mask=out_ok)


def fuses(weight: torch.Tensor, num_rows: int) -> bool:
    """Whether `linear` takes a norm and a gate along, for inputs of num_rows rows."""
    return 0 < num_rows <= max_gemv_rows(weight.numel())


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """As WeightFormat.multiply."""
    x = x.contiguous()
    if fuses(weight, x.shape[0]):
        return _gemv(x, weight, bias, norm, gated, out)
    assert norm is None and not gated
    if out is not None and bias is None:
        return torch.mm(x, weight.T, out=out)
    return F.linear(x, weight, bias)


def add_linear(
    total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """As WeightFormat.add."""
    x = x.contiguous()
    if fuses(weight, x.shape[0]):
        _gemv(x, weight, bias, residual=total)
    elif bias is None:
        total.addmm_(x, weight.T)
    else:
        total.add_(F.linear(x, weight, bias))


def _gemv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: tuple[torch.Tensor, float] | None = None,
    gated: bool = False,
    out: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """With few rows: the product, in `out` if it is there, or added to a residual."""
    assert x.is_contiguous() and weight.is_contiguous()
    num_rows, size = x.shape
    num_out = weight.shape[0] // 2 if gated else weight.shape[0]
    if out is None:
        out = x.new_empty(num_rows, num_out) if residual is None else residual
    assert out.is_contiguous()
    norm_weight, eps = norm or (x, 0.0)
    config = gemv_config(size, x.element_size(), gated)
    gemv_kernel[(cdiv(num_out, config.block_n),)](
        out, x, weight, x if bias is None else bias, norm_weight, eps,
        ROWS=num_rows, PADDED_ROWS=next_power_of_2(num_rows), N=num_out, K=size,
        BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        NORM=norm is not None, GATED=gated, BIAS=bias is not None, ADD=residual is not None,
        num_warps=config.num_warps, **pdl_options(x.device),
    )  # fmt: skip
    return out
