"""The operations of a layer in plain torch: what a CPU runs, and what kernels are tested against.
Attention is in reference_attention.py, what follows the LM head in reference_sampling.py.

Shape suffixes: T tokens, H query heads, K key/value heads, D head_dim.
"""

import torch

from nanovllm.ops.batch import ForwardBatch, KVLayer, Rotary


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (Zhang and Sennrich
    2019)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return weight * x32.to(x.dtype)


def apply_rope(x_THD: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of a head by its position's angle (Su et al. 2021, in Llama's
    half-split layout).

    Args:
        cos_sin: [T, D] float32, D/2 cosines, then D/2 sines.
    """
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)  # [T, 1, D/2] each
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THD.dtype)


def qk_norm_rope_store(
    qkv: torch.Tensor, rotary: Rotary, batch: ForwardBatch, kv: KVLayer
) -> torch.Tensor:
    """From the QKV projection to attention: RMSNorm on query and key heads if the model has it,
    RoPE, and keys and values into the cache.

    Args:
        qkv: [T, (H + 2K) * D].

    Returns: the queries, [T, H, D].
    """
    num_kv_heads, head_dim = kv.k.shape[-2:]
    qkv = qkv.view(len(qkv), -1, head_dim)
    qk, v = qkv[:, :-num_kv_heads], qkv[:, -num_kv_heads:]  # all heads of queries and keys at once
    if rotary.norm_weights is not None:
        q_weight, k_weight = rotary.norm_weights
        num_heads = qk.shape[1] - num_kv_heads
        weights = torch.cat((q_weight.expand(num_heads, -1), k_weight.expand(num_kv_heads, -1)))
        qk = rms_norm(qk, weights, rotary.eps)
    qk = apply_rope(qk, rotary.table[batch.positions])
    q, k = qk[:, :-num_kv_heads], qk[:, -num_kv_heads:]
    store(k, v, kv, batch.groups[kv.group].slot_mapping)
    return q


def store(k: torch.Tensor, v: torch.Tensor, kv: KVLayer, slots: torch.Tensor) -> None:
    """Put keys and values into the cache.

    Args:
        k, v: [T, K, D].
        slots: [T] int64, block * block_size + offset; -1: the block, which is shared, has them.
    """
    if slots.numel() and slots.min() < 0:
        stored = slots >= 0
        slots, k, v = slots[stored], k[stored], v[stored]
    kv.k.flatten(0, 1).index_copy_(0, slots, k)
    kv.v.flatten(0, 1).index_copy_(0, slots, v)
