"""All that a model's forward sees: the step's tokens (ForwardBatch) and the paged cache (KVCache).

The worker makes them; models pass them down; only attention looks inside.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The query tokens of a step, those of one sequence after those of another. T tokens, S
    sequences.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64, each token's place in its sequence.
        slot_mapping: [T] int64, where its key and value go (page * block_size + offset); -1: they
            are there already.
        block_tables: [S, pages] int32, rows padded with pages that exist.
        query_start: [S + 1] int32, where each sequence's query tokens begin.
        context_lens: [S] int32, tokens each sequence attends to at its last query token.
        max_query_len: the longest query.
        num_decodes: the first so many sequences have one query token each.
        logits_indices: [sampled sequences] int64, the tokens whose logits are wanted.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    num_decodes: int
    logits_indices: torch.Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's pages: keys and values, each [blocks, block_size, kv_heads, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


class KVCache:
    """The pages of all layers, one tensor [layers, 2, blocks, block_size, kv_heads, head_dim]."""

    def __init__(self, data: torch.Tensor):
        self.data = data

    def layer(self, index: int) -> KVLayer:
        return KVLayer(self.data[index, 0], self.data[index, 1])
