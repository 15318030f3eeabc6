"""Every operation of a layer in plain torch: what a CPU runs, and what kernels are tested against.
Those behind the LM head are in reference_sampling.py.

Shape suffixes: T tokens, S sequences, H query heads, K key/value heads, G query heads a key/value
head, D head_dim, L keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.ops.batch import Attention, ForwardBatch, KVLayer, Rotary

# Decodes attend in groups, padded to a common length. A group of several gathers at most so many
# keys, so that they are still in the CPU's cache when they are used.
MAX_GATHERED_TOKENS = 1024


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
    store(k, v, kv, batch.slot_mapping)
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


class DecodeGroup(NamedTuple):
    """Decodes that attend together, padded to a common length.

    Attributes:
        seqs: [S] their places in the batch.
        tables: [S, pages].
        mask: [S, 1, 1, L] which keys of their pages are theirs.
        padding: [n] the others, as indices of S * L.
    """

    seqs: torch.Tensor
    tables: torch.Tensor
    mask: torch.Tensor
    padding: torch.Tensor


def decode_groups(batch: ForwardBatch, block_size: int) -> list[DecodeGroup]:
    """The step's decodes in groups, for paged_attention: the same in all layers."""
    context_lens, groups = batch.context_lens[: batch.num_decodes].tolist(), []
    for group in _group(context_lens, block_size):
        num_blocks = -(-context_lens[group[-1]] // block_size)
        seqs = torch.tensor(group, device=batch.context_lens.device)
        keys = torch.arange(num_blocks * block_size, device=seqs.device)
        mask = keys < batch.context_lens[seqs, None]
        padding = (~mask).flatten().nonzero().squeeze(1)
        tables = batch.block_tables[batch.rows[seqs], :num_blocks]
        groups.append(DecodeGroup(seqs, tables, mask[:, None, None], padding))
    return groups


def paged_attention(
    q: torch.Tensor,
    kv: KVLayer,
    batch: ForwardBatch,
    scale: float,
    groups: list[DecodeGroup] | None = None,
) -> torch.Tensor:
    """Causal attention of each query token over its sequence's pages; the last query token sees
    context_lens keys.

    Args:
        q: [T, H, D].
        groups: the batch's decode_groups, if they are there already.

    Returns: [T, H, D].
    """
    out = torch.empty_like(q)
    num_decodes, block_size = batch.num_decodes, kv.k.shape[1]
    for group in decode_groups(batch, block_size) if groups is None else groups:
        out[group.seqs] = _attend_decodes(q[group.seqs], kv, group, scale)
    context_lens, query_start = batch.context_lens.tolist(), batch.query_start.tolist()
    for i in range(num_decodes, len(context_lens)):
        start, end = query_start[i : i + 2]
        table = batch.block_tables[batch.rows[i], : -(-context_lens[i] // block_size)]
        out[start:end] = _attend_chunk(q[start:end], kv, table, context_lens[i], scale)
    return out


def keep_sampled(
    last_tokens: torch.Tensor,
    host_tokens: torch.Tensor,
    rows: torch.Tensor,
    token_ids: torch.Tensor,
    turn: torch.Tensor,
) -> None:
    """Sampled tokens go to their rows' state, and to the host.

    Args:
        last_tokens: [all rows] int64.
        host_tokens: [turns, n or more] int64.
        rows, token_ids: [n] int64.
        turn: [1] int32, which row of host_tokens.
    """
    last_tokens[rows] = token_ids
    host_tokens[turn, : len(rows)] = token_ids


class TorchAttention(Attention):
    """The attention backend in plain torch.

    Attributes:
        batch, groups: the last step's, and its decode_groups, which its first layer makes.
    """

    name = "TORCH_SDPA"

    def __init__(self) -> None:
        self.batch: ForwardBatch | None = None
        self.groups: list[DecodeGroup] = []

    def host_arrays(self, *_: object) -> dict[str, np.ndarray]:
        return {}

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        if batch is not self.batch:
            self.batch, self.groups = batch, decode_groups(batch, kv.k.shape[1])
        return paged_attention(q, kv, batch, scale, self.groups)


def _group(context_lens: list[int], block_size: int) -> Iterator[list[int]]:
    """Sequences of like length, shortest first, as many as fit in the bound at the whole pages of
    the longest of them."""
    group: list[int] = []
    for seq in sorted(range(len(context_lens)), key=context_lens.__getitem__):
        padded_len = -(-context_lens[seq] // block_size) * block_size
        if group and (len(group) + 1) * padded_len > MAX_GATHERED_TOKENS:
            yield group
            group = []
        group.append(seq)
    if group:
        yield group


def _attend_decodes(
    q_SHD: torch.Tensor, kv: KVLayer, group: DecodeGroup, scale: float
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = q_SHD.shape
    num_kv_heads, num_keys = kv.k.shape[2], group.mask.shape[-1]

    def gather(pages: torch.Tensor) -> torch.Tensor:  # [S, K, L, D]
        keys = pages.flatten(1).index_select(0, group.tables.flatten())
        keys = keys.view(num_seqs * num_keys, -1)
        # What lies beyond a context belongs to others, and 0 times their NaN would be NaN.
        keys.index_fill_(0, group.padding, 0.0)
        return keys.view(num_seqs, num_keys, num_kv_heads, head_dim).transpose(1, 2)

    k, v = gather(kv.k), gather(kv.v)
    # The query heads that share a key head are that head's query rows.
    q_SKGD = q_SHD.view(num_seqs, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(q_SKGD, k, v, group.mask, scale=scale)
    return out.reshape(num_seqs, num_heads, head_dim)


def _attend_chunk(
    q_THD: torch.Tensor, kv: KVLayer, block_table: torch.Tensor, context_len: int, scale: float
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = kv.k.shape[-2]
    num_groups = num_heads // num_kv_heads
    k, v = (  # [K, G, L, D], the groups without a copy
        pages[block_table].view(-1, num_kv_heads, head_dim)[:context_len]
        .transpose(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1)
        for pages in (kv.k, kv.v)
    )  # fmt: skip
    q_KGTD = q_THD.view(num_tokens, num_kv_heads, num_groups, head_dim).permute(1, 2, 0, 3)
    if context_len == num_tokens:
        out = F.scaled_dot_product_attention(q_KGTD, k, v, is_causal=True, scale=scale)
    else:
        last = torch.arange(context_len - num_tokens, context_len, device=q_THD.device)
        mask_TL = torch.arange(context_len, device=q_THD.device) <= last[:, None]
        out = F.scaled_dot_product_attention(q_KGTD, k, v, mask_TL, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
