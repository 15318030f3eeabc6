"""The reference operations against plain float64 formulas on fresh random inputs."""

import numpy as np
import pytest
import torch
from kernel_calls import attention_in_float64, paged_case

from nanovllm import ops
from nanovllm.core.model_config import RopeConfig
from nanovllm.layers.rope import Rope
from nanovllm.ops import reference, reference_attention
from nanovllm.ops.batch import BatchGroup, ForwardBatch, KVLayer, Queries, Rotary
from nanovllm.ops.reference_attention import TorchAttention

CPU = torch.device("cpu")


def make_case(query_lens, context_lens, heads, kv_heads, head_dim, block_size, window=None):
    """A step over randomly scattered blocks, by the reference's backend; NaN in all else."""
    q, kv, case = paged_case(
        query_lens, context_lens, heads, kv_heads, head_dim, block_size, torch.float32, CPU
    )
    case.attention = TorchAttention(window)
    lens = case.query_lens, case.context_lens, case.num_decodes
    case.arrays = case.attention.host_arrays(
        Queries(case.tables, case.rows, case.query_start, *lens)
    )
    return q, kv, case


@pytest.mark.parametrize("window", [None, 1, 7, 16, 30])
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
def test_attention(
    heads, kv_heads, head_dim, block_size, query_lens, context_lens, window, monkeypatch
):
    # Several groups of decodes.
    monkeypatch.setattr(reference_attention, "MAX_GATHERED_TOKENS", 50)
    sizes = heads, kv_heads, head_dim, block_size
    q, kv, case = make_case(query_lens, context_lens, *sizes, window)
    if window is not None:  # blocks outside of the window may be other sequences', or empty
        forget_keys_outside(kv, case, window)
    out = case.attend(q, kv, head_dim**-0.5)
    expected = attention_in_float64(q, kv, case, head_dim**-0.5, window)
    assert (out - expected).norm() / expected.norm() < 1e-5


def forget_keys_outside(kv, case, window):
    block_size = kv.k.shape[1]
    for row, query_len, context_len in zip(
        case.rows, case.query_lens, case.context_lens, strict=True
    ):
        gone = np.arange(max(0, context_len - query_len + 1 - window))
        slots = case.tables[row, gone // block_size] * block_size + gone % block_size
        for cache in (kv.k, kv.v):
            cache.flatten(0, 1)[torch.from_numpy(slots).long()] = torch.nan


def test_decodes_that_attend_together_are_of_like_length():
    context_lens = [5, 300, 17, 1, 1000, 16, 2000, 290, 33]
    groups = list(reference_attention._like_lengths(context_lens, block_size=16))
    assert sorted(seq for group in groups for seq in group) == list(range(9))
    for group in groups:
        lens = [context_lens[seq] for seq in group]
        assert lens == sorted(lens)
        padded = -(-lens[-1] // 16) * 16 * len(lens)
        assert len(group) == 1 or padded <= reference_attention.MAX_GATHERED_TOKENS
    assert list(reference_attention._like_lengths([], block_size=16)) == []


def test_decodes_gather_a_bounded_number_of_keys(monkeypatch):
    monkeypatch.setattr(reference_attention, "MAX_GATHERED_TOKENS", 64)
    _, _, case = make_case([1] * 8, [3, 1, 20, 2, 2, 40, 1, 1], 4, 2, 16, 16)
    [group] = case.batch.groups
    decodes, queries = reference_attention.plan_queries(group, 16, None)
    assert len(decodes) > 2 and max(some.mask.numel() for some in decodes) <= 64
    assert not queries


@pytest.mark.parametrize("norm", [False, True])
def test_qk_norm_rope_store(norm):
    heads, kv_heads, head_dim, block_size = 6, 2, 20, 4
    slots = torch.randperm(30 * block_size)[:15]
    slots[3] = -1  # lies in a shared block already
    positions = torch.randint(0, 64, (15,))
    batch = ForwardBatch(None, positions, (BatchGroup(None, slots, None, {}),))
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
        angle = positions[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # complex rotation
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    q, k, v = qkv.view(15, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    q_weight, k_weight = weights or (None, None)
    out = reference.qk_norm_rope_store(qkv, Rotary(weights, 1e-6, table), batch, kv)
    torch.testing.assert_close(out, expect(q, q_weight).float(), rtol=1e-5, atol=1e-5)

    expected_k, expected_v = old.clone().flatten(1, 2)
    stored = slots >= 0
    expected_k[slots[stored]] = expect(k, k_weight).float()[stored]
    expected_v[slots[stored]] = v[stored]
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
    slots = torch.randperm(30 * 4)[:15]
    slots[3] = -1  # lies in a shared block already
    batch = ForwardBatch(None, None, (BatchGroup(None, slots, None, {}),))
    old = torch.randn(2, 30, 4, 2, 20)
    kv, (k, v) = KVLayer(*old.clone()), torch.randn(2, 15, 2, 20)
    ops.store(k, v, kv, batch)
    stored = slots >= 0
    for cache, before, new in ((kv.k, old[0], k), (kv.v, old[1], v)):
        expected = before.flatten(0, 1).clone()
        expected[slots[stored]] = new[stored]
        assert torch.equal(cache.flatten(0, 1), expected)
