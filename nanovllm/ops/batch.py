"""What a model's forward sees: the step's tokens (ForwardBatch) and the KV cache; and what
ops.begin_step makes the tokens of.

The worker makes them, models pass them down, layers/attention.py and the attention backends look
inside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch


class StepColumns(NamedTuple):
    """What the host says of a step's T query tokens, int32: tensors in pinned memory, or the same
    memory as arrays. The tokens of one sequence come one after another. The columns are rows of one
    memory, in this order.

    Attributes:
        counts: [6]: T, T with padding, sampled tokens, sampled tokens with padding, the slot of
            the step's record, and the age in steps of the attention's work lists.
        row: [T], the row of the token's sequence.
        position: [T], the token's place in its sequence.
        token: [T], the token; -1: the one that was last sampled for the row.
        sampled: [T], the index among the sampled tokens of the one after it; -1: none is sampled.
        stored: [T], whether its key and value are stored, or are in the cache already (0).
        block: [groups, T], the block that the token opens in each group; -1: none.
    """

    counts: Any
    row: Any
    position: Any
    token: Any
    sampled: Any
    stored: Any
    block: Any


class RowState(NamedTuple):
    """What the device keeps of each row. The last row is padding's: no sequence has it. The columns
    of a line below are rows of one memory, in this order.

    Attributes:
        block_tables: [groups, rows, blocks] int32; behind a sequence's blocks stand blocks that
            exist.
        last_tokens: [rows] int64, the tokens sampled last.
        seed, top_k: [rows] int64.
        temperature, top_p, min_p: [rows] float32.
    """

    block_tables: torch.Tensor
    last_tokens: torch.Tensor
    seed: torch.Tensor
    top_k: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor


class Draws(NamedTuple):
    """What n tokens are sampled by, beside their logits; ops.sample takes it.

    Attributes:
        temperature: [n] float32; 0: the most likely token.
        noise_keys: [n, 2] int64, two 32-bit keys.
        top_k: [n] int64; the vocabulary's size keeps all. None: no row has a limit.
        top_p, min_p: [n] float32, or None.
    """

    temperature: torch.Tensor
    noise_keys: torch.Tensor
    top_k: torch.Tensor | None = None
    top_p: torch.Tensor | None = None
    min_p: torch.Tensor | None = None


class StepTensors(NamedTuple):
    """What ops.begin_step makes of columns and rows, in memory that each step overwrites. One
    memory each: token_ids, positions, slot_mapping; sampled_tokens, rows, draws.top_k; temperature,
    top_p, min_p of draws; slot, list_age.

    Attributes:
        token_ids, positions: [T] int64.
        slot_mapping: [groups, T] int64, where the token's key and value go (block * block_size +
            offset); -1: nowhere.
        sampled_tokens: [n] int64, by index among the sampled tokens: the query token before it.
        rows: [n] int64, the sampled tokens' rows.
        draws: the sampled tokens'.
        slot, list_age: [1] int32, as in StepColumns.counts.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    sampled_tokens: torch.Tensor
    rows: torch.Tensor
    draws: Draws
    slot: torch.Tensor
    list_age: torch.Tensor


@dataclass(frozen=True, slots=True)
class BatchGroup:
    """What a step's tokens have for one group of layers.

    Attributes:
        block_tables: [rows, blocks] int32, of all rows.
        slot_mapping: [T] int64; -1: the key and value are not stored.
        attention: the backend that reads the cache.
        arrays: what its host_arrays said of this step, on the device; and list_age.
    """

    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    attention: "Attention"
    arrays: dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The query tokens of a step, sequence after sequence.

    Attributes:
        token_ids, positions: [T] int64.
        groups: by KVLayer.group.
        max_query_len: query tokens of the longest query; in a CUDA graph 1.
        is_decode: whether the step has no chunks. (A graph that holds chunks has more tokens than
            a backend takes right from the projection.)
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    groups: tuple[BatchGroup, ...]
    max_query_len: int = 1
    is_decode: bool = False


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
    """One layer's blocks: keys and values, each [blocks, block_size, kv_heads, head_dim]; and the
    layer's group."""

    k: torch.Tensor
    v: torch.Tensor
    group: int = 0


class KVCache:
    """The blocks of a model's layers. A model runs the layers that its cache has.

    Args:
        data: of each group, [its layers, 2, blocks, block_size, kv_heads, head_dim].
        group_of: the group of each layer, in the model's order.
    """

    def __init__(self, data: Sequence[torch.Tensor], group_of: Sequence[int]):
        self.data, self.group_of = data, group_of
        layers = [iter(of_group) for of_group in data]
        self.layers = []
        for group in group_of:
            keys, values = next(layers[group])
            self.layers.append(KVLayer(keys, values, group))

    @property
    def first_layers(self) -> "KVCache":
        """Enough to try what all layers do: up to the first layer of every group."""
        num = 1 + max(self.group_of.index(group) for group in range(len(self.data)))
        return KVCache(self.data, self.group_of[:num])


AttendProjected = Callable[[torch.Tensor, Rotary, "KVLayer", ForwardBatch, float], torch.Tensor]


class Queries(NamedTuple):
    """A step's sequences as an attention backend sees them on the host, decodes first.

    Attributes:
        block_tables: [rows, blocks] of all rows.
        rows, query_lens, context_lens: [S]; the last query token of a sequence sees context_lens
            keys.
        query_start: [S + 1], the first query token of each sequence.
        num_decodes: the first sequences, which are decodes.
        graph_size: the CUDA graph's tokens, padding included; None: the step is not replayed.
    """

    block_tables: np.ndarray
    rows: np.ndarray
    query_start: np.ndarray
    query_lens: np.ndarray
    context_lens: np.ndarray
    num_decodes: int
    graph_size: int | None = None


class Attention(Protocol):
    """An attention backend, of one group of layers.

    Attributes:
        name: vLLM's.
        in_graphs: whether `attend` can be captured in a CUDA graph: it asks nothing of the device.
        attend_projected: None, or attention of a batch of decodes right from the projection: what
            qk_norm_rope_store and attend do, at once. It takes what ops.attention takes.
        steps_per_list: steps of the same decodes that its host_arrays serve, if the batch's
            list_age, [1] int32, says how many steps old they are.
        least_mixed: tokens of the smallest CUDA graph that may hold a step with chunks; None: no
            graph may.
        mixed_keys: keys that the chunks of such a step may read: a chunk's tokens times its
            sequence's, over all chunks.
    """

    name: str
    in_graphs: bool = True
    attend_projected: "AttendProjected | None" = None
    steps_per_list: int = 1
    least_mixed: int | None = None
    mixed_keys: int = 0

    def host_arrays(self, queries: Queries) -> dict[str, np.ndarray]:
        """What the backend wants on the device for a step: BatchGroup.arrays. In a CUDA graph its
        size and the arrays' names decide about all shapes."""
        ...

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """Causal attention of each query token over its sequence's blocks.

        Args:
            q: [T, H, D].

        Returns: [T, H, D].
        """
        ...

    def reset(self) -> None:
        """Forget a step of which some kernels did not run."""
        return
