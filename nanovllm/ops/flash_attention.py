"""Attention by the flash-attn package (version 2's functions), where it is installed."""

import numpy as np
import torch

from nanovllm.ops.batch import Attention, ForwardBatch, KVLayer, Queries

try:
    import flash_attn
except ImportError:
    flash_attn = None

BLOCK_MULTIPLE = 256  # flash-attn 2 reads no smaller blocks
MAX_HEAD_DIM = 256


class FlashAttention(Attention):
    """Decodes and chunks in a call each.

    Args:
        head_dim: of the model.
        dtype: of queries and cache.
        block_size: tokens per block.

    Raises:
        ValueError: the package is missing, or has no kernel for these.
    """

    name = "FLASH_ATTN"

    def __init__(self, head_dim: int, dtype: torch.dtype, block_size: int):
        if flash_attn is None:
            raise ValueError(
                "attention_backend 'FLASH_ATTN' needs the flash-attn package: "
                "pip install 'nanovllm[flash-attn]', or leave attention_backend out"
            )
        if block_size % BLOCK_MULTIPLE:
            raise ValueError(
                f"attention_backend 'FLASH_ATTN' reads blocks of a multiple of {BLOCK_MULTIPLE} "
                f"tokens; block_size={block_size} is none: leave it out, or use 'TRITON_ATTN'"
            )
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"attention_backend 'FLASH_ATTN' computes in float16 and bfloat16, not {dtype}; "
                f"use 'TRITON_ATTN'"
            )
        if head_dim > MAX_HEAD_DIM or head_dim % 8:
            raise ValueError(
                f"attention_backend 'FLASH_ATTN' takes a head_dim of at most {MAX_HEAD_DIM} that "
                f"8 divides, not {head_dim}; use 'TRITON_ATTN'"
            )
        self.block_size = block_size

    def host_arrays(self, queries: Queries) -> dict[str, np.ndarray]:
        block_tables, rows, query_start, _, context_lens, num_decodes, graph_size = queries
        if graph_size is not None:  # decodes; padding sees a token of block 0
            tables = np.zeros((graph_size, block_tables.shape[1]), np.int32)
            tables[: len(rows)] = block_tables[rows]
            decode_lens = np.ones(graph_size, np.int32)
            decode_lens[: len(rows)] = context_lens
            return {"tables": tables, "decode_lens": decode_lens}
        num_blocks = -(-int(context_lens.max()) // self.block_size)
        chunk_lens = context_lens[num_decodes:]
        return {
            "tables": block_tables[rows, :num_blocks],
            "decode_lens": context_lens[:num_decodes].astype(np.int32),
            "chunk_query_start": (query_start[num_decodes:] - num_decodes).astype(np.int32),
            "chunk_key_start": np.concatenate(([0], chunk_lens.cumsum())).astype(np.int32),
        }

    def attend(
        self, q: torch.Tensor, kv: KVLayer, batch: ForwardBatch, scale: float
    ) -> torch.Tensor:
        """As reference_attention.TorchAttention."""
        arrays = batch.groups[kv.group].arrays
        num_decodes = len(arrays["decode_lens"])
        outs = []
        if num_decodes:
            decodes = flash_attn.flash_attn_with_kvcache(
                q[:num_decodes, None],
                kv.k,
                kv.v,
                cache_seqlens=arrays["decode_lens"],
                block_table=arrays["tables"][:num_decodes],
                softmax_scale=scale,
                causal=True,
            )
            outs.append(decodes.squeeze(1))
        if num_decodes < len(q):
            tables = arrays["tables"][num_decodes:]
            chunks = flash_attn.flash_attn_varlen_func(
                q[num_decodes:],
                kv.k,
                kv.v,
                cu_seqlens_q=arrays["chunk_query_start"],
                cu_seqlens_k=arrays["chunk_key_start"],
                max_seqlen_q=batch.max_query_len,
                max_seqlen_k=tables.shape[1] * self.block_size,
                softmax_scale=scale,
                causal=True,
                block_table=tables,
            )
            outs.append(chunks)
        return outs[0] if len(outs) == 1 else torch.cat(outs)
