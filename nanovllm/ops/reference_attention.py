"""Attention over the blocks of the KV cache in plain torch: what a CPU runs, and what kernels are
tested against.

Shape suffixes: T tokens, S sequences, H query heads, K key/value heads, G query heads a key/value
head, D head_dim, L keys.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from nanovllm.ops.batch import Attention, BatchGroup, ForwardBatch, KVLayer, Queries

# Decodes attend together, padded to a common length. Several gather at most this number of keys,
# so that the keys are still in the CPU's cache when they are used.
MAX_GATHERED_TOKENS = 1024


class Decodes(NamedTuple):
    """Decodes that attend together, padded to a common length.

    Attributes:
        tokens: [S] their places in the batch.
        tables: [S, blocks].
        mask: [S, 1, 1, L] which keys of these blocks each one sees.
        padding: [n] the other keys, as indices of S * L.
    """

    tokens: torch.Tensor
    tables: torch.Tensor
    mask: torch.Tensor
    padding: torch.Tensor


class Query(NamedTuple):
    """A chunk: its query tokens in the batch, its block table, and the keys that its last query
    token sees."""

    tokens: slice
    table: torch.Tensor
    context_len: int


class TorchAttention(Attention):
    """The attention backend in plain torch.

    Args:
        window: tokens that a query token sees, itself included; None: all.

    Attributes:
        group, plan: the last step's, and how its queries attend: the same in all layers of the
            group, so its first layer makes it.
    """

    name = "TORCH_SDPA"
    in_graphs = False

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.group: BatchGroup | None = None
        self.plan: tuple[list[Decodes], list[Query]] = [], []

    def host_arrays(self, queries: Queries) -> dict[str, np.ndarray]:
        names = ("rows", "query_start", "context_lens")
        return {name: getattr(queries, name) for name in names}

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        group = batch.groups[kv.group]
        if group is not self.group:
            self.group, self.plan = group, plan_queries(group, kv.k.shape[1], self.window)
        out = torch.empty_like(q)
        decodes, queries = self.plan
        for some in decodes:
            out[some.tokens] = _attend_decodes(q[some.tokens], kv, some, scale)
        for tokens, table, context_len in queries:
            out[tokens] = _attend_chunk(q[tokens], kv, table, context_len, scale, self.window)
        return out


def plan_queries(
    group: BatchGroup, block_size: int, window: int | None
) -> tuple[list[Decodes], list[Query]]:
    """The first sequences of one query token each, which attend together, and the others."""
    rows, context_lens = group.arrays["rows"], group.arrays["context_lens"]
    starts, lens = group.arrays["query_start"].tolist(), context_lens.tolist()
    num_decodes = next((i for i in range(len(lens)) if starts[i + 1] > i + 1), len(lens))
    decodes = []
    for seqs in _like_lengths(lens[:num_decodes], block_size):
        first, num_blocks = 0, -(-lens[seqs[-1]] // block_size)
        if window is not None:  # the blocks before the shortest sequence's window are not read
            first = max(0, lens[seqs[0]] - window) // block_size
        tokens = torch.tensor(seqs, device=rows.device)
        keys = torch.arange(first * block_size, num_blocks * block_size, device=rows.device)
        ends = context_lens[tokens, None]
        mask = keys < ends
        if window is not None:
            mask &= keys >= ends - window
        padding = (~mask).flatten().nonzero().squeeze(1)
        tables = group.block_tables[rows[tokens], first:num_blocks]
        decodes.append(Decodes(tokens, tables, mask[:, None, None], padding))
    queries = []
    for i in range(num_decodes, len(lens)):
        table = group.block_tables[rows[i], : -(-lens[i] // block_size)]
        queries.append(Query(slice(starts[i], starts[i + 1]), table, lens[i]))
    return decodes, queries


def _like_lengths(context_lens: list[int], block_size: int) -> Iterator[list[int]]:
    """Sequences of like length, shortest first, within the bound on keys at the whole blocks of
    the longest of them."""
    seqs: list[int] = []
    for seq in sorted(range(len(context_lens)), key=context_lens.__getitem__):
        padded_len = -(-context_lens[seq] // block_size) * block_size
        if seqs and (len(seqs) + 1) * padded_len > MAX_GATHERED_TOKENS:
            yield seqs
            seqs = []
        seqs.append(seq)
    if seqs:
        yield seqs


def _attend_decodes(
    q_SHD: torch.Tensor, kv: KVLayer, decodes: Decodes, scale: float
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = q_SHD.shape
    num_kv_heads, num_keys = kv.k.shape[2], decodes.mask.shape[-1]

    gathered = []
    for blocks in (kv.k, kv.v):
        keys = blocks.flatten(1).index_select(0, decodes.tables.flatten())
        keys = keys.view(num_seqs * num_keys, -1)
        # Keys that are not seen are other sequences', and 0 times their NaN would be NaN.
        keys.index_fill_(0, decodes.padding, 0.0)
        keys = keys.view(num_seqs, num_keys, num_kv_heads, head_dim)
        gathered.append(keys.transpose(1, 2))
    k, v = gathered  # [S, K, L, D]
    # The query heads that share a key head are that head's query rows.
    q_SKGD = q_SHD.view(num_seqs, num_kv_heads, -1, head_dim)
    out = F.scaled_dot_product_attention(q_SKGD, k, v, decodes.mask, scale=scale)
    return out.reshape(num_seqs, num_heads, head_dim)


def _attend_chunk(
    q_THD: torch.Tensor,
    kv: KVLayer,
    block_table: torch.Tensor,
    context_len: int,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads, block_size = kv.k.shape[-2], kv.k.shape[1]
    num_groups = num_heads // num_kv_heads
    first_query = context_len - num_tokens
    # Blocks before the first token's window may hold anything.
    first_key = 0 if window is None else max(0, first_query + 1 - window)
    skipped = first_key // block_size
    keys = slice(first_key - skipped * block_size, context_len - skipped * block_size)
    k, v = (  # [K, G, L, D], the groups without a copy
        blocks[block_table[skipped:]].view(-1, num_kv_heads, head_dim)[keys]
        .transpose(0, 1).unsqueeze(1).expand(-1, num_groups, -1, -1)
        for blocks in (kv.k, kv.v)
    )  # fmt: skip
    q_KGTD = q_THD.view(num_tokens, num_kv_heads, num_groups, head_dim).permute(1, 2, 0, 3)
    if context_len == num_tokens and (window is None or num_tokens <= window):
        out = F.scaled_dot_product_attention(q_KGTD, k, v, is_causal=True, scale=scale)
    else:
        query = torch.arange(first_query, context_len, device=q_THD.device)[:, None]
        key = torch.arange(first_key, context_len, device=q_THD.device)
        mask_TL = key <= query
        if window is not None:
            mask_TL &= key > query - window
        out = F.scaled_dot_product_attention(q_KGTD, k, v, mask_TL, scale=scale)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_dim)
