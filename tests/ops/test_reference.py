"""The reference operations against plain float64 formulas on fresh random inputs."""

import pytest
import torch

from nanovllm import ops
from nanovllm.core.model_config import RopeConfig
from nanovllm.layers.rope import Rope
from nanovllm.ops import reference
from nanovllm.ops.batch import ForwardBatch, KVLayer, Rotary


def make_batch(query_lens, context_lens, block_size, num_blocks):
    """A batch over randomly scattered blocks."""
    tables_len = -(-max(context_lens) // block_size)
    free = torch.randperm(num_blocks).tolist()
    tables = torch.zeros(len(query_lens), tables_len, dtype=torch.int32)
    positions, slots = [], []
    for i, (query, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        pages = [free.pop() for _ in range(-(-context // block_size))]
        tables[i, : len(pages)] = torch.tensor(pages)
        for position in range(context - query, context):
            positions.append(position)
            slots.append(pages[position // block_size] * block_size + position % block_size)
    start = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_decodes = next((i for i, n in enumerate(query_lens) if n > 1), len(query_lens))
    return ForwardBatch(
        token_ids=torch.zeros(len(positions), dtype=torch.int64),
        positions=torch.tensor(positions),
        slot_mapping=torch.tensor(slots),
        block_tables=tables,
        rows=torch.arange(len(query_lens)),
        query_start=start,
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(query_lens),
        num_decodes=num_decodes,
        logits_indices=start[1:].long() - 1,
        attention=reference.TorchAttention(),
    )


def naive_attention(q, kv, batch, scale):
    """One query token and one head at a time, in float64."""
    block_size = kv.k.shape[1]
    groups = q.shape[1] // kv.k.shape[2]
    out = torch.empty_like(q, dtype=torch.float64)
    for i in range(len(batch.context_lens)):
        for t in range(batch.query_start[i], batch.query_start[i + 1]):
            position = torch.arange(int(batch.positions[t]) + 1)
            pages = batch.block_tables[i, position // block_size].long()
            k, v = (x[pages, position % block_size].double() for x in (kv.k, kv.v))
            for h in range(q.shape[1]):
                scores = k[:, h // groups] @ q[t, h].double() * scale
                out[t, h] = scores.softmax(0) @ v[:, h // groups]
    return out


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", [(4, 2, 16), (9, 3, 20), (5, 5, 80), (8, 1, 64)]
)
@pytest.mark.parametrize("block_size", [1, 16, 5])
@pytest.mark.parametrize("query_lens, context_lens", [
    ([1, 1, 1], [1, 40, 17]),
    ([7], [7]),
    ([1, 1, 5, 3, 12], [33, 2, 5, 30, 12]),
    ([4, 1], [20, 9]),
])  # fmt: skip
def test_paged_attention(
    heads, kv_heads, head_dim, block_size, query_lens, context_lens, monkeypatch
):
    monkeypatch.setattr(reference, "MAX_GATHERED_TOKENS", 50)  # several groups of decodes
    batch = make_batch(query_lens, context_lens, block_size, num_blocks=200)
    shape = (200, block_size, kv_heads, head_dim)
    kv = KVLayer(torch.randn(shape), torch.randn(shape))
    q = torch.randn(sum(query_lens), heads, head_dim)
    out = reference.paged_attention(q, kv, batch, head_dim**-0.5)
    expected = naive_attention(q, kv, batch, head_dim**-0.5)
    assert (out - expected).norm() / expected.norm() < 1e-5


def test_decode_groups_hold_every_sequence_once_with_little_padding():
    context_lens = [5, 300, 17, 1, 1000, 16, 2000, 290, 33]
    groups = list(reference._group(context_lens, block_size=16))
    assert sorted(seq for group in groups for seq in group) == list(range(9))
    for group in groups:
        lens = [context_lens[seq] for seq in group]
        assert lens == sorted(lens)
        padded = -(-lens[-1] // 16) * 16 * len(lens)
        assert len(group) == 1 or padded <= reference.MAX_GATHERED_TOKENS
    assert list(reference._group([], block_size=16)) == []


def test_decodes_gather_a_bounded_number_of_keys(monkeypatch):
    monkeypatch.setattr(reference, "MAX_GATHERED_TOKENS", 64)
    gathered = []
    attend = reference._attend_decodes

    def spy(q, kv, group, scale):
        gathered.append(group.mask.numel())
        return attend(q, kv, group, scale)

    monkeypatch.setattr(reference, "_attend_decodes", spy)
    batch = make_batch([1] * 8, [3, 1, 20, 2, 2, 40, 1, 1], block_size=16, num_blocks=20)
    kv = KVLayer(*torch.randn(2, 20, 16, 2, 16))
    reference.paged_attention(torch.randn(8, 4, 16), kv, batch, 0.25)
    assert len(gathered) > 2 and max(gathered) <= 64


def test_attention_is_untouched_by_what_others_left_in_a_page():
    batch = make_batch([1, 1, 3], [3, 40, 9], block_size=16, num_blocks=20)
    kv = KVLayer(*torch.full((2, 20, 16, 2, 16), torch.nan))
    for i, context in enumerate([3, 40, 9]):
        position = torch.arange(context)
        pages = batch.block_tables[i, position // 16].long()
        kv.k[pages, position % 16] = torch.randn(context, 2, 16)
        kv.v[pages, position % 16] = torch.randn(context, 2, 16)
    q = torch.randn(5, 4, 16)
    expected = naive_attention(q, kv, batch, 0.25)
    torch.testing.assert_close(reference.paged_attention(q, kv, batch, 0.25), expected.float())


@pytest.mark.parametrize("norm", [False, True])
def test_qk_norm_rope_store(norm):
    heads, kv_heads, head_dim, block_size = 6, 2, 20, 4
    batch = make_batch([1, 5, 9], [13, 5, 30], block_size, num_blocks=30)
    batch.slot_mapping[3] = -1  # lies in a shared block already
    old = torch.randn(2, 30, block_size, kv_heads, head_dim)
    kv = KVLayer(*old.clone())
    qkv = torch.randn(15, (heads + 2 * kv_heads) * head_dim)
    weights = (torch.randn(head_dim), torch.randn(head_dim)) if norm else None
    table = Rope(RopeConfig(10000.0), head_dim, 64).table

    def expect(x, weight):
        x = x.double()
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
        half = head_dim // 2
        angle = batch.positions[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # complex rotation
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = qkv.view(15, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    q_weight, k_weight = weights or (None, None)
    out = reference.qk_norm_rope_store(qkv, Rotary(weights, 1e-6, table), batch, kv)
    torch.testing.assert_close(out, expect(q, q_weight).float(), rtol=1e-5, atol=1e-5)

    expected_k, expected_v = old.clone().flatten(1, 2)
    stored = batch.slot_mapping >= 0
    expected_k[batch.slot_mapping[stored]] = expect(k, k_weight).float()[stored]
    expected_v[batch.slot_mapping[stored]] = v[stored]
    torch.testing.assert_close(kv.k.flatten(0, 1), expected_k, rtol=1e-5, atol=1e-5)
    assert torch.equal(kv.v.flatten(0, 1), expected_v)


def test_rms_norm():
    x, weight = torch.randn(7, 48), torch.randn(48)
    exact = x.double()
    exact = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), exact.float())


def test_silu_and_mul():
    gate, up = torch.randn(2, 5, 48)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up
    torch.testing.assert_close(ops.silu_and_mul(torch.cat((gate, up), -1)), expected.float())


def test_store_writes_the_batchs_slots_and_no_others():
    batch = make_batch([1, 5, 9], [13, 5, 30], block_size=4, num_blocks=30)
    batch.slot_mapping[3] = -1  # lies in a shared block already
    old = torch.randn(2, 30, 4, 2, 20)
    kv, (k, v) = KVLayer(*old.clone()), torch.randn(2, 15, 2, 20)
    ops.store(k, v, kv, batch)
    stored = batch.slot_mapping >= 0
    for cache, before, new in ((kv.k, old[0], k), (kv.v, old[1], v)):
        expected = before.flatten(0, 1).clone()
        expected[batch.slot_mapping[stored]] = new[stored]
        assert torch.equal(cache.flatten(0, 1), expected)
