"""The operations of reference.py as fused Triton kernels, one launch each: what a GPU runs.

Each rounds where its reference does, so that the two differ by the order of sums alone.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.ops.batch import ForwardBatch, KVLayer, Rotary
from nanovllm.ops.triton.kernel_configs import (
    HEADS_PER_PROGRAM,
    SILU_BLOCK,
    cdiv,
    next_power_of_2,
)

# In Triton 3.4 the functions are there, but do not compile.
TRITON_HAS_PDL = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5)


@functools.cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Launch options for programmatic dependent launch, which Hopper and newer GPUs have: a kernel
    starts while the one before it ends, and waits for its results with gdc_wait. Before the wait
    it may read only what was there before the step's first kernel: weights, inputs, older keys.
    (Attention to a sequence's own keys, launched behind attention to shared keys, is the
    exception.)"""
    has_pdl = (
        TRITON_HAS_PDL
        and device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )
    return {"PDL": True, "launch_pdl": True} if has_pdl else {"PDL": False}


@triton.jit
def rms_norm_kernel(
    out, x, weight, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A program normalises a row of x."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK)
    ok = dims < SIZE
    w = tl.load(weight + dims, mask=ok, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + row * SIZE + dims, mask=ok, other=0.0)
    x32 = value.to(tl.float32)
    normed = (x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / SIZE + eps)).to(value.dtype)
    tl.store(out + row * SIZE + dims, normed.to(tl.float32) * w.to(tl.float32), mask=ok)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As reference.rms_norm."""
    x = x.contiguous()
    out, size = torch.empty_like(x), x.shape[-1]
    block = next_power_of_2(size)
    if x.numel():
        rms_norm_kernel[(x.numel() // size,)](
            out, x, weight, eps, SIZE=size, BLOCK=block,
            num_warps=min(16, max(1, block // 512)), **pdl_options(x.device),
        )  # fmt: skip
    return out


@triton.jit
def silu_and_mul_kernel(out, gate_up, SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = dims < SIZE
    gate = tl.load(gate_up + row * 2 * SIZE + dims, mask=ok, other=0.0)
    up = tl.load(gate_up + row * 2 * SIZE + SIZE + dims, mask=ok, other=0.0).to(tl.float32)
    gate32 = gate.to(tl.float32)
    silu = (gate32 / (1.0 + tl.exp(-gate32))).to(gate.dtype)
    tl.store(out + row * SIZE + dims, silu.to(tl.float32) * up, mask=ok)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    size = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], size)
    if out.numel():
        grid = (out.numel() // size, cdiv(size, SILU_BLOCK))
        silu_and_mul_kernel[grid](
            out, gate_up, SIZE=size, BLOCK=SILU_BLOCK, num_warps=4, **pdl_options(out.device)
        )
    return out


@triton.jit
def qk_norm_rope_store_kernel(
    q_out, k_cache, v_cache, qkv, q_weight, k_weight, rope_table, positions, slot_mapping, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's heads, HEADS a program, each as its two halves [HEADS, HALF]."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, HALF)
    is_q = head < NUM_HEADS
    is_k = (head >= NUM_HEADS) & (head < NUM_HEADS + NUM_KV_HEADS)
    is_v = head >= NUM_HEADS + NUM_KV_HEADS
    num_heads_in: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    dims_ok = dims < HEAD_DIM // 2
    ok = (head < num_heads_in)[:, None] & dims_ok[None, :]
    slot = tl.load(slot_mapping + token)
    angles = rope_table + tl.load(positions + token) * HEAD_DIM + dims
    cos = tl.load(angles, mask=dims_ok, other=0.0)[None, :]
    sin = tl.load(angles + HEAD_DIM // 2, mask=dims_ok, other=0.0)[None, :]
    if NORM:
        qa = tl.load(q_weight + dims, mask=dims_ok, other=0.0)[None, :].to(tl.float32)
        qb = tl.load(q_weight + HEAD_DIM // 2 + dims, mask=dims_ok, other=0.0)[None, :]
        ka = tl.load(k_weight + dims, mask=dims_ok, other=0.0)[None, :].to(tl.float32)
        kb = tl.load(k_weight + HEAD_DIM // 2 + dims, mask=dims_ok, other=0.0)[None, :]
        weight_a = tl.where(is_q[:, None], qa, ka)
        weight_b = tl.where(is_q[:, None], qb.to(tl.float32), kb.to(tl.float32))
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    offsets = head[:, None] * HEAD_DIM + dims[None, :]
    source = qkv + token * num_heads_in * HEAD_DIM + offsets
    a_in = tl.load(source, mask=ok, other=0.0)
    b_in = tl.load(source + HEAD_DIM // 2, mask=ok, other=0.0)
    a, b = a_in.to(tl.float32), b_in.to(tl.float32)
    if NORM:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
        a = (a * scale).to(a_in.dtype).to(tl.float32) * weight_a
        b = (b * scale).to(a_in.dtype).to(tl.float32) * weight_b
        a, b = a.to(a_in.dtype).to(tl.float32), b.to(a_in.dtype).to(tl.float32)
    a_out = tl.where(is_v[:, None], a_in, (a * cos - b * sin).to(a_in.dtype))
    b_out = tl.where(is_v[:, None], b_in, (b * cos + a * sin).to(a_in.dtype))

    to_q = q_out + token * NUM_HEADS * HEAD_DIM + offsets
    tl.store(to_q, a_out, mask=ok & is_q[:, None])
    tl.store(to_q + HEAD_DIM // 2, b_out, mask=ok & is_q[:, None])
    if slot >= 0:
        in_cache = slot * NUM_KV_HEADS * HEAD_DIM + offsets
        to_k = k_cache + in_cache - NUM_HEADS * HEAD_DIM
        tl.store(to_k, a_out, mask=ok & is_k[:, None])
        tl.store(to_k + HEAD_DIM // 2, b_out, mask=ok & is_k[:, None])
        to_v = v_cache + in_cache - (NUM_HEADS + NUM_KV_HEADS) * HEAD_DIM
        tl.store(to_v, a_out, mask=ok & is_v[:, None])
        tl.store(to_v + HEAD_DIM // 2, b_out, mask=ok & is_v[:, None])


def qk_norm_rope_store(
    qkv: torch.Tensor, rotary: Rotary, batch: ForwardBatch, kv: KVLayer
) -> torch.Tensor:
    num_kv_heads, head_dim = kv.k.shape[-2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    num_tokens = qkv.shape[0]
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    if num_tokens == 0:
        return q
    q_weight, k_weight = rotary.norm_weights or (qkv, qkv)
    num_heads_in = num_heads + 2 * num_kv_heads
    qk_norm_rope_store_kernel[(num_tokens, cdiv(num_heads_in, HEADS_PER_PROGRAM))](
        q, kv.k, kv.v, qkv, q_weight, k_weight, rotary.table, batch.positions,
        batch.groups[kv.group].slot_mapping, rotary.eps,
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        HEADS=HEADS_PER_PROGRAM, HALF=next_power_of_2(head_dim // 2),
        NORM=rotary.norm_weights is not None, num_warps=4, **pdl_options(qkv.device),
    )  # fmt: skip
    return q


@triton.jit
def store_kernel(
    k_cache, v_cache, k, v, slot_mapping, k_stride, v_stride,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program stores BLOCK elements of a token's keys and values, SIZE elements each."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slot_mapping + token)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if slot >= 0:
        ok = dims < SIZE
        key = tl.load(k + token * k_stride + dims, mask=ok, other=0.0)
        value = tl.load(v + token * v_stride + dims, mask=ok, other=0.0)
        tl.store(k_cache + slot * SIZE + dims, key, mask=ok)
        tl.store(v_cache + slot * SIZE + dims, value, mask=ok)


def store(k: torch.Tensor, v: torch.Tensor, kv: KVLayer, slots: torch.Tensor) -> None:
    """As reference.store."""
    num_tokens, size = k.shape[0], k.shape[1] * k.shape[2]
    # Heads may be a part of a projection's row, but have to follow one another in it.
    k, v = (x if x[:1].is_contiguous() else x.contiguous() for x in (k, v))
    if num_tokens:
        store_kernel[(num_tokens, cdiv(size, SILU_BLOCK))](
            kv.k, kv.v, k, v, slots, k.stride(0), v.stride(0), SIZE=size, BLOCK=SILU_BLOCK,
            num_warps=4, **pdl_options(k.device),
        )  # fmt: skip
