"""The attention backend in Triton: makes each step's work lists and launches attention_kernel.py on
them, in the configurations of kernel_configs.py.

worker/inputs.py calls host_arrays, layers call the rest by ops/__init__.py.
"""

import numpy as np
import torch

from nanovllm.ops.batch import Attention, ForwardBatch, KVLayer, Queries, Rotary
from nanovllm.ops.triton.attention_kernel import merge_prefixes_kernel, paged_attention_kernel
from nanovllm.ops.triton.kernel_configs import (
    CROWD_PROGRAMS_PER_SM,
    DEEP_KEYS,
    DEEP_SHARE,
    FEW_KEYS_PER_SM,
    FEW_PROGRAMS_PER_SM,
    MIN_GAIN_BYTES,
    MIXED_KEYS,
    PROJECTED_PROGRAMS_PER_SM,
    AttentionConfig,
    attention_configs,
    next_power_of_2,
)
from nanovllm.ops.triton.layers import pdl_options, qk_norm_rope_store
from nanovllm.ops.triton.shared_prefix import find_groups, max_tiles
from nanovllm.ops.triton.work_list import (
    ITEM_WIDTH,
    Prefixes,
    Sizes,
    max_items,
    max_shared_slots,
    max_slots,
    prefixes_of,
    work_list,
)

LOG2_E = 1.4426950408889634


class TritonAttention(Attention):
    """Attention of one model on one GPU: its configurations and the memory for partial results.

    Args:
        num_heads, num_kv_heads, head_dim: of the model.
        block_size: tokens per block.
        dtype: of queries and cache.
        device: a GPU.
        num_sms: its multiprocessors.
        max_decodes: of a step.
    """

    name = "TRITON_ATTN"
    steps_per_list = 64  # the last parts grow by fewer keys

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        num_sms: int,
        max_decodes: int,
    ):
        self.num_kv_heads = num_kv_heads
        self.group = num_heads // num_kv_heads
        self.block_size = block_size
        self.block_d = next_power_of_2(max(head_dim, 16))
        self.min_gain_bytes = MIN_GAIN_BYTES
        self.max_projected = PROJECTED_PROGRAMS_PER_SM * num_sms // num_kv_heads  # decodes
        # More than come right from the projection: new keys are stored when attention begins.
        self.least_mixed = self.max_projected + 1
        self.key_bytes = 2 * num_kv_heads * head_dim * dtype.itemsize
        self.precision = "ieee" if dtype == torch.float32 else "tf32"  # for 16 bits: no effect
        self.num_sms = num_sms
        self.configs = attention_configs(head_dim, dtype.itemsize)
        self.mixed_keys = MIXED_KEYS * self._tile_tokens(self.configs["short"])
        # Slots of shared keys come behind the slots that each launch uses anew.
        self.shared_from = max(
            max_slots(0 if name == "long" else max_decodes, self._sizes(config))
            for name, config in self.configs.items()
        )
        shared_sizes = self._sizes(self.configs["shared"])
        num_slots = self.shared_from + max_shared_slots(max_decodes, shared_sizes)
        self.partial = torch.empty(num_slots * num_heads * self.block_d, device=device)
        self.stats = torch.empty(num_slots * num_heads * 2, device=device)
        self.arrivals = torch.zeros(
            self.shared_from * num_kv_heads, dtype=torch.int32, device=device
        )

    def host_arrays(self, queries: Queries) -> dict[str, np.ndarray]:
        """The step's work lists. A graph's has room for all that its tokens may need; which lists
        there are depends on their keys too, and each choice has a graph of its own."""
        block_tables, rows, query_start, query_lens, context_lens, num_decodes, size = queries
        shared, prefixes = self._shared(block_tables, rows, context_lens, num_decodes, size)
        arrays = dict(shared)
        short = query_lens <= self._tile_tokens(self.configs["short"])
        if size is not None:
            short[:] = True  # in tiles of a few tokens
        num_short = size or np.count_nonzero(short)
        num_keys = context_lens - prefixes.num_keys if prefixes else context_lens
        is_alone = num_decodes == len(rows) and prefixes is None
        short_name = self._short_layout(int(num_short), num_keys[short], is_alone)
        for name, seqs in ((short_name, short), ("long", ~short)):
            if not seqs.any():
                continue
            config = self.configs[name]
            items = work_list(
                rows[seqs],
                query_start[:-1][seqs],
                query_lens[seqs],
                context_lens[seqs],
                self._sizes(config),
                prefixes=Prefixes(*(a[seqs] for a in prefixes)) if prefixes else None,
            )
            arrays |= self._item_arrays(name, config, items, size)
        return arrays

    def _short_layout(self, num_tiles: int, num_keys: np.ndarray, is_alone: bool) -> str:
        """The configuration for a step's short queries.

        Args:
            num_tiles: their tiles at most; in a graph its size.
            num_keys: keys that each query's own programs read; a chunk's count once.
            is_alone: whether decodes have no other launch beside them. Where they have, the
                latency of a few decodes is hidden, and "few" would be one kernel more.
        """
        num_programs = num_tiles * self.num_kv_heads
        all_keys = int(num_keys.sum()) * self.num_kv_heads
        if num_programs >= CROWD_PROGRAMS_PER_SM * self.num_sms:
            return "crowd"
        is_few = num_programs <= FEW_PROGRAMS_PER_SM * self.num_sms
        if is_alone and is_few and all_keys <= FEW_KEYS_PER_SM * self.num_sms:
            return "few"
        even_share = all_keys / self._sizes(self.configs["short"]).num_units
        is_deep = even_share > DEEP_KEYS and (
            num_tiles <= self.max_projected or num_keys.max() > DEEP_SHARE * even_share
        )
        return "deep" if is_deep else "short"

    def _shared(
        self,
        block_tables: np.ndarray,
        rows: np.ndarray,
        context_lens: np.ndarray,
        num_decodes: int,
        graph_size: int | None,
    ) -> tuple[dict[str, np.ndarray], Prefixes | None]:
        """The work list of the keys that decodes share, and what it leaves to the sequences;
        nothing where it would not pay."""
        config = self.configs["shared"]
        groups = find_groups(
            block_tables,
            rows[:num_decodes],
            context_lens[:num_decodes],
            block_size=self.block_size,
            tile_tokens=self._tile_tokens(config),
            group=self.group,
        )
        if groups.gain * self.key_bytes <= self.min_gain_bytes:
            return {}, None
        first_member = groups.sizes.cumsum() - groups.sizes
        items = work_list(
            rows[groups.members[first_member]],
            first_member,
            groups.sizes,
            groups.num_pages * self.block_size,
            self._sizes(config),
            shared_from=self.shared_from,
        )
        tokens = groups.members.astype(np.int32)
        if graph_size is not None:
            tokens = np.append(tokens, np.zeros(graph_size - len(tokens), np.int32))
        num_tiles = None if graph_size is None else max_tiles(graph_size)
        arrays = {
            "shared_tokens": tokens,
            **self._item_arrays("shared", config, items, num_tiles),
        }
        return arrays, prefixes_of(items, groups.members, len(rows))

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """As reference_attention.TorchAttention."""
        return self._launch(q, None, kv, batch, scale)

    def attend_projected(
        self, qkv: torch.Tensor, rotary: Rotary, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """As reference.qk_norm_rope_store, then attend."""
        apart = {"shared_items", "deep_items"} & batch.groups[kv.group].arrays.keys()
        if qkv.shape[0] <= self.max_projected and not apart:
            return self._launch(qkv, rotary, kv, batch, scale)
        return self.attend(qk_norm_rope_store(qkv, rotary, batch, kv), kv, batch, scale)

    def reset(self) -> None:
        self.arrivals.zero_()

    def _launch(
        self,
        q: torch.Tensor,
        rotary: Rotary | None,
        kv: KVLayer,
        batch: ForwardBatch,
        scale: float,
    ) -> torch.Tensor:
        """q: rotated, [T, H, D], or with `rotary` from the projection."""
        head_dim = kv.k.shape[-1]
        out = q.new_empty(q.shape[0], self.num_kv_heads * self.group, head_dim)
        norm_weights = rotary.norm_weights if rotary else None
        q_weight, k_weight = norm_weights or (q, q)
        group = batch.groups[kv.group]
        arrays, block_tables = group.arrays, group.block_tables
        # Shared keys first, then at once each sequence's own keys: the second launch begins when
        # all before the first is there, and does not wait for the first.
        for name, config in self.configs.items():
            items = arrays.get(f"{name}_items")
            if items is None:
                continue
            has_prefixes = name not in ("shared", "long") and "shared_items" in arrays
            page_stride, slot_stride, head_stride, _ = kv.k.stride()
            paged_attention_kernel[(items.shape[0] * self.num_kv_heads,)](
                out, q, kv.k, kv.v, block_tables,
                items, arrays["list_age"], arrays["shared_tokens"] if name == "shared" else None,
                group.slot_mapping, q_weight, k_weight,
                rotary.table if rotary else q, rotary.eps if rotary else 0.0,
                self.partial, self.stats, self.arrivals,
                scale * LOG2_E, block_tables.stride(0), page_stride, slot_stride, head_stride,
                NUM_KV_HEADS=self.num_kv_heads, GROUP=self.group, HEAD_DIM=head_dim,
                BLOCK_SIZE=self.block_size, BLOCK_M=self._block_m(config), BLOCK_N=config.block_n,
                BLOCK_D=self.block_d, PRECISION=self.precision, HAS_PREFIXES=has_prefixes,
                PROJECTED=rotary is not None, NORM=norm_weights is not None,
                num_warps=config.num_warps, num_stages=config.num_stages,
                **pdl_options(q.device),
            )  # fmt: skip
            if has_prefixes:
                merge_prefixes_kernel[(items.shape[0] * self.num_kv_heads,)](
                    out, items, self.partial, self.stats, NUM_KV_HEADS=self.num_kv_heads,
                    GROUP=self.group, HEAD_DIM=head_dim,
                    BLOCK_M=next_power_of_2(self.group), BLOCK_D=self.block_d, num_warps=1,
                    **pdl_options(q.device),
                )  # fmt: skip
        return out

    def _item_arrays(
        self, name: str, config: AttentionConfig, items: np.ndarray, num_tiles: int | None
    ) -> dict[str, np.ndarray]:
        """A work list for the device; for a CUDA graph with room for the items of num_tiles
        tiles."""
        if num_tiles is not None:
            room = max_items(num_tiles, self._sizes(config))
            items = np.concatenate((items, np.zeros((room - len(items), ITEM_WIDTH), np.int32)))
        return {f"{name}_items": items}

    def _sizes(self, config: AttentionConfig) -> Sizes:
        return Sizes(
            self._tile_tokens(config),
            self.num_kv_heads,
            self.num_sms * config.programs_per_sm,
            config.min_keys,
        )

    def _block_m(self, config: AttentionConfig) -> int:
        return max(config.block_m, next_power_of_2(self.group))

    def _tile_tokens(self, config: AttentionConfig) -> int:
        return self._block_m(config) // self.group
