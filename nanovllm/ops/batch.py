"""All that a model's forward sees: the step's tokens (ForwardBatch) and the paged cache (KVCache).

The worker makes them; models pass them down; only attention looks inside.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
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
        block_tables: [rows, pages] int32, of all rows; padded with pages that exist.
        rows: [S] int64, each sequence's row of block_tables.
        query_start: [S + 1] int32, where each sequence's query tokens begin.
        context_lens: [S] int32, tokens each sequence attends to at its last query token.
        max_query_len: the longest query.
        num_decodes: the first so many sequences have one query token each.
        logits_indices: [sampled sequences] int64, the tokens whose logits are wanted; None: all.
        attention: the backend that reads the cache.
        attention_arrays: what it prepared for this step, among the step's other arrays.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    block_tables: torch.Tensor
    rows: torch.Tensor
    query_start: torch.Tensor
    context_lens: torch.Tensor
    max_query_len: int
    num_decodes: int
    logits_indices: torch.Tensor | None
    attention: "Attention"
    attention_arrays: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def is_decode(self) -> bool:
        """Whether all of it is decodes."""
        return self.num_decodes == len(self.rows)


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The attention of a layer. Layers of one KV shape and window form a group of the cache.

    Attributes:
        num_heads, num_kv_heads, head_dim: sizes of queries, and of keys and values.
        scale: of the products of queries and keys.
        window: tokens that a query sees, itself included; None: all before it.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Rotary:
    """What query and key heads go through between projection and attention: RMSNorm, if the model
    has it, and RoPE.

    Attributes:
        norm_weights: of queries and keys, [D] each, or None.
        eps: of the norms.
        table: [positions, D] float32, D/2 cosines, then D/2 sines.
    """

    norm_weights: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    table: torch.Tensor


@dataclass(frozen=True, slots=True)
class KVLayer:
    """One layer's pages: keys and values, each [blocks, block_size, kv_heads, head_dim]."""

    k: torch.Tensor
    v: torch.Tensor


class KVCache:
    """The pages of all layers, one tensor [layers, 2, blocks, block_size, kv_heads, head_dim]. A
    model runs as many layers as its cache has."""

    def __init__(self, data: torch.Tensor):
        self.data = data
        self.layers = [KVLayer(keys, values) for keys, values in data]

    @property
    def first_layer(self) -> "KVCache":
        """Enough to try what all layers do."""
        return KVCache(self.data[:1])


AttendProjected = Callable[[torch.Tensor, Rotary, "KVLayer", ForwardBatch, float], torch.Tensor]


class Attention(Protocol):
    """An attention backend.

    Attributes:
        name: vLLM's.
        attend_projected: None, or attention of a batch of decodes right from the projection: what
            qk_norm_rope_store and attend do, at once. It takes what ops.attention takes.
        steps_per_list: for how many steps of the same decodes its host_arrays may serve, if their
            list_age, [1] int32, says how many steps old they are.
        least_mixed: tokens of the smallest CUDA graph that may hold a step with chunks; None: none
            may. (There the rows of a chunk's tokens are not those of its block table.)
        mixed_keys: how much such chunks may read: a chunk's tokens times those of its sequence,
            over all chunks.
    """

    name: str
    attend_projected: "AttendProjected | None" = None
    steps_per_list: int = 1
    least_mixed: int | None = None
    mixed_keys: int = 0

    def host_arrays(
        self,
        block_tables: np.ndarray,
        rows: np.ndarray,
        query_start: np.ndarray,
        query_lens: np.ndarray,
        context_lens: np.ndarray,
        num_decodes: int,
        graph_size: int | None,
    ) -> dict[str, np.ndarray]:
        """What the backend wants on the device for a step; it finds it in attention_arrays.

        Args:
            block_tables: [rows, pages] of all rows.
            rows, query_lens, context_lens: [S] of the step's sequences.
            query_start: [S + 1].
            num_decodes: as in ForwardBatch.
            graph_size: None, or so many tokens there are with padding: the names of the arrays and
                it decide about all shapes, as a CUDA graph needs.
        """
        ...

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """Causal attention of each query token over its sequence's pages; the last query token
        sees context_lens keys.

        Args:
            q: [T, H, D].

        Returns: [T, H, D].
        """
        ...
