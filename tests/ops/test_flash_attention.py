"""The flash-attn backend against the reference, with the package's two functions replaced by plain
ones: what it is handed is what it needs."""

import types

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.ops import flash_attention
from nanovllm.ops.batch import KVLayer
from nanovllm.ops.flash_attention import FlashAttention
from nanovllm.ops.reference_attention import TorchAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import InputBuilder, StepShape
from nanovllm.worker.record import make_records
from nanovllm.worker.rows import Rows

CPU = torch.device("cpu")
BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 256, 4, 2, 16


def attend(q, k_cache, v_cache, table, num_keys, scale):
    """One sequence; its last query token sees all its keys."""
    k, v = (
        cache[table.long()].flatten(0, 1)[:num_keys].repeat_interleave(HEADS // KV_HEADS, 1)
        for cache in (k_cache, v_cache)
    )
    mask = torch.ones(len(q), num_keys, dtype=torch.bool).tril(num_keys - len(q))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(0, 1)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, cache_seqlens, block_table, softmax_scale, causal
):
    assert causal and q.shape[1] == 1 and len(q) == len(cache_seqlens) == len(block_table)
    return torch.stack([
        attend(q[i], k_cache, v_cache, block_table[i], n, softmax_scale)
        for i, n in enumerate(cache_seqlens.tolist())
    ])  # fmt: skip


def flash_attn_varlen_func(
    q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
    block_table,
):  # fmt: skip
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    q_start, lens = cu_seqlens_q.tolist(), cu_seqlens_k.diff().tolist()
    assert q_start[0] == 0 and q_start[-1] == len(q) and len(lens) == len(block_table)
    assert max_seqlen_q >= cu_seqlens_q.diff().max() and max_seqlen_k >= max(lens)
    return torch.cat([
        attend(q[q_start[i] : q_start[i + 1]], k, v, block_table[i], n, softmax_scale)
        for i, n in enumerate(lens)
    ])  # fmt: skip


@pytest.mark.parametrize("num_decodes, query_lens, context_lens", [
    (3, [1, 1, 1], [5, 300, 256]),
    (1, [1, 1, 5], [11, 21, 5]),  # a decode, a chunk of one token, a chunk
    (0, [1], [1]),
    (2, [1, 1, 40, 1, 300], [600, 3, 40, 257, 300]),
])  # fmt: skip
def test_it_attends_as_the_reference(monkeypatch, num_decodes, query_lens, context_lens):
    package = types.SimpleNamespace(
        flash_attn_with_kvcache=flash_attn_with_kvcache,
        flash_attn_varlen_func=flash_attn_varlen_func,
    )
    monkeypatch.setattr(flash_attention, "flash_attn", package)
    attention = FlashAttention(HEAD_DIM, torch.bfloat16, BLOCK_SIZE)
    firsts = [context - query for query, context in zip(query_lens, context_lens, strict=True)]
    step = StepInput(
        decode_rows=np.arange(num_decodes),
        decode_positions=np.array(firsts[:num_decodes], int),
        decode_blocks=np.full((1, num_decodes), -1, np.int32),
    )
    blocks = torch.randperm(40).tolist()
    for row, (query_len, context_len) in enumerate(zip(query_lens, context_lens, strict=True)):
        count = -(-context_len // BLOCK_SIZE)
        table = np.array([blocks.pop() for _ in range(count)], np.int32)
        step.starts.append(RowStart(row, 0, SamplingParams(), 0, (), 0, (table,)))
        if row >= num_decodes:
            step.chunks.append(Chunk(row, firsts[row], [0] * query_len, samples=True))
    kv = KVLayer(*torch.randn(2, 40, BLOCK_SIZE, KV_HEADS, HEAD_DIM))
    q = torch.randn(sum(query_lens), HEADS, HEAD_DIM)
    sizes = (None, 6) if not step.chunks else (None,)
    for size in sizes:  # a graph's padding, too
        outs = []
        for backend in (TorchAttention(), attention):
            rows = Rows(8, 1, 4, 100, CPU)
            [record, *_], _ = make_records(8, 1, 400, CPU)
            rows.start(step.starts, record)
            inputs = InputBuilder(rows, (backend,), BLOCK_SIZE, 400)
            is_torch = backend is not attention
            arrays = record.upload(inputs.begin(step, record, None if is_torch else size))
            num_tokens = len(q) if is_torch or size is None else size
            shape = StepShape(num_tokens, 0, max_query_len=max(query_lens))
            padded = torch.cat((q, q.new_zeros(num_tokens - len(q), HEADS, HEAD_DIM)))
            outs.append(backend.attend(padded, kv, inputs.batch(shape, arrays), 0.3)[: len(q)])
        torch.testing.assert_close(*outs)
