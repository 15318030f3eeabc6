"""The Triton kernels against float64, on fresh random inputs: compiled on a machine with a GPU,
interpreted on others (conftest.py sees to that)."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from kernel_calls import (
    LENS,
    attention_in_float64,
    launch_attention,
    paged_case,
    pairwise,
    relative_error,
    tolerance,
)

from nanovllm.core.model_config import RopeConfig
from nanovllm.layers.rope import Rope
from nanovllm.ops import reference, reference_sampling
from nanovllm.ops.batch import BatchGroup, ForwardBatch, KVLayer, Queries, Rotary
from nanovllm.ops.reference_rows import noise_keys
from nanovllm.ops.reference_sampling import VOCAB_BLOCK, gumbel_noise, gumbel_of_bits
from nanovllm.ops.triton import layers as triton_ops
from nanovllm.ops.triton import linear as triton_linear
from nanovllm.ops.triton import sampling as triton_sampling
from nanovllm.ops.triton.attention import TritonAttention

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = pytest.mark.gpu
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
DEVICES = [pytest.param(CPU, marks=interpreted), pytest.param(CUDA, marks=on_gpu)]


# Attention


def check_attention(query_lens, context_lens, heads, kv_heads, head_dim, *args, **kwargs):
    q, kv, case = paged_case(query_lens, context_lens, heads, kv_heads, head_dim, *args, **kwargs)
    out = case.attend(q, kv, head_dim**-0.5)
    expected = attention_in_float64(q, kv, case, head_dim**-0.5)
    assert relative_error(out, expected) < tolerance(q.dtype)
    again = case.attend(q, kv, head_dim**-0.5)  # the counters are as before
    assert torch.equal(out, again)
    return case


@interpreted
@pytest.mark.parametrize("block_size", [16, 64, 256, 5])
@pytest.mark.parametrize("num_sms", [1, 60])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, query_lens, context_lens",
    [
        (4, 2, 32, [1, 1, 1], [5, 300, 130]),
        (6, 2, 20, [1, 9, 20], [270, 9, 60]),
        (14, 2, 16, [1, 40], [257, 100]),
        (3, 3, 80, [1, 1, 70], [1, 129, 70]),
    ],
)
def test_attention_interpreted(
    heads, kv_heads, head_dim, query_lens, context_lens, num_sms, block_size
):
    step = check_attention(
        query_lens, context_lens, heads, kv_heads, head_dim, block_size, torch.float32, CPU,
        num_sms=num_sms,
    )  # fmt: skip
    arrays = step.arrays
    items = arrays["few_items" if "few_items" in arrays else "short_items"]
    if num_sms == 60 and max(context_lens) > 200:
        assert (items[:, 6] >= 0).any()


def shared_cases():
    """(query lengths, context lengths, groups) by name; blocks of 16."""
    rng = np.random.default_rng(3)
    own = rng.integers(1, 90, 40)
    order = rng.permutation(40)
    one, other = order[:20], order[20:32]  # and loners
    two_groups = own.copy()
    two_groups[one] += 6 * 16
    two_groups[other] += 33 * 16
    return {
        "one page": ([1] * 40, own + 16, [(np.arange(40), 1)]),
        "few pages": ([1] * 40, own + 6 * 16, [(np.arange(40), 6)]),
        "all share": ([1] * 40, own + 20 * 16, [(np.arange(40), 20)]),
        "all have one token": ([1] * 9, [20 * 16 + 1] * 9, [(np.arange(9), 20)]),
        "own parts are split": ([1] * 9, [*[340] * 7, 900, 350], [(np.arange(9), 20)]),
        "groups, loners": ([1] * 40, two_groups, [(one, 6), (other, 33)]),
        "groups, loners, chunks": (
            [1] * 40 + [3, 50], [*two_groups, 6 * 16 + 3, 90],
            [(np.append(one, 40), 6), (other, 33), (np.array([one[0], 41]), 1)],
        ),
    }  # fmt: skip


SHARED_CASES = shared_cases()


def shares(step):
    return "shared_items" in step.arrays


@interpreted
@pytest.mark.parametrize("num_sms", [1, 60])
@pytest.mark.parametrize("case", SHARED_CASES)
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 32), (14, 2, 20), (3, 3, 16)])
def test_shared_prefixes_interpreted(heads, kv_heads, head_dim, case, num_sms):
    query_lens, context_lens, groups = SHARED_CASES[case]
    step = check_attention(
        query_lens, context_lens, heads, kv_heads, head_dim, 16, torch.float32, CPU,
        num_sms=num_sms, groups=groups,
    )  # fmt: skip
    assert shares(step) == (heads != 14 or case != "one page")  # seven results each cost more
    if shares(step):
        shared = step.arrays["shared_tokens"].tolist()
        members = np.concatenate([seqs for seqs, _ in groups[:2]])
        assert sorted(shared) == sorted(members[members < step.num_decodes].tolist())
    if "split" in case and num_sms == 60:
        slots = step.arrays["short_items"][:, 6:9]
        assert ((slots[:, 0] > slots[:, 1]) & (slots[:, 2] > 1)).any()


@on_gpu
@pytest.mark.parametrize("case", SHARED_CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(16, 8, 128), (14, 2, 64), (8, 8, 80)])
def test_shared_prefixes_on_a_gpu(heads, kv_heads, head_dim, dtype, case):
    query_lens, context_lens, groups = SHARED_CASES[case]
    step = check_attention(
        query_lens, context_lens, heads, kv_heads, head_dim, 16, dtype, CUDA, groups=groups
    )
    assert shares(step) == (heads != 14 or case != "one page")


@interpreted
def test_a_crowd_interpreted():
    lens = np.random.default_rng().integers(1, 90, 12)
    step = check_attention([1] * 12, lens, 4, 2, 128, 16, torch.float16, CPU, num_sms=1)
    assert "crowd_items" in step.arrays


def check_in_a_graphs_tiles(query_lens, context_lens, size, *args, **kwargs):
    """All in one list of work, chunks too, which has room for a size."""
    q, kv, step = paged_case(query_lens, context_lens, *args, **kwargs)
    lens = step.query_lens, step.context_lens, step.num_decodes
    step.arrays = arrays = step.attention.host_arrays(
        Queries(step.tables, step.rows, step.query_start, *lens, size)
    )
    assert "long_items" not in arrays
    head_dim = q.shape[-1]
    for _ in range(2):  # the counters are as before
        out = step.attend(q, kv, head_dim**-0.5)
        expected = attention_in_float64(q, kv, step, head_dim**-0.5)
        assert relative_error(out, expected) < tolerance(q.dtype)
    return arrays


MIXED = [1] * 5 + [3, 40, 1, 70, 17], [5, 300, 33, 1, 64, 3, 40, 90, 333, 100]


@interpreted
@pytest.mark.parametrize("num_sms", [1, 60])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(4, 2, 32), (14, 2, 20), (3, 3, 80)])
def test_chunks_in_a_graphs_tiles_interpreted(heads, kv_heads, head_dim, num_sms):
    size = sum(MIXED[0]) + num_sms - 1
    check_in_a_graphs_tiles(
        *MIXED, size, heads, kv_heads, head_dim, 16, torch.float32, CPU, num_sms=num_sms
    )


@interpreted
def test_long_contexts_interpreted(monkeypatch):
    monkeypatch.setattr("nanovllm.ops.triton.attention.DEEP_KEYS", 100)
    case = [1] * 3, [50, 1000, 300], 4, 2, 32, 16, torch.float32, CPU
    step = check_attention(*case, num_sms=1)
    assert (step.arrays["deep_items"][:, 8] > 1).any()
    assert "deep_items" in check_in_a_graphs_tiles(*case[:2], 5, *case[2:], num_sms=1)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("num_decodes", [3, 400])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(16, 8, 128), (14, 2, 64), (32, 8, 80)])
def test_chunks_in_a_graphs_tiles_on_a_gpu(heads, kv_heads, head_dim, num_decodes, dtype):
    rng = np.random.default_rng()
    chunks = rng.integers(1, 200, 6)
    query_lens = [*[1] * num_decodes, *chunks.tolist()]
    context_lens = [*rng.integers(1, 500, num_decodes), *(chunks + rng.integers(0, 900, 6))]
    size = sum(query_lens) + int(rng.integers(0, 100))
    sizes = heads, kv_heads, head_dim, 16, dtype, CUDA
    arrays = check_in_a_graphs_tiles(query_lens, context_lens, size, *sizes)
    assert "shared_items" not in arrays


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(16, 8, 128), (32, 8, 64), (14, 2, 256)])
def test_long_contexts_on_a_gpu(heads, kv_heads, head_dim, dtype):
    lens = np.random.default_rng().integers(1000, 30_000, 12)
    sizes = heads, kv_heads, head_dim, 16, dtype, CUDA
    step = check_attention([1] * len(lens), lens, *sizes)
    assert kv_heads == 2 or "deep_items" in step.arrays
    check_projected([*[4000] * 40, 100, 9000], *sizes, norm=True)


ATTENTION_CASES = pairwise(
    heads=[(16, 8), (32, 8), (32, 32), (14, 2), (9, 3), (24, 1)],
    head_dim=[64, 80, 96, 128, 256, 2, 50],
    block_size=[16, 32, 64, 128, 256, 48],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    lens=["decodes", "crowd", "one", "skewed", "chunks", "mixed"],
)


@pytest.fixture(scope="module")
def compiled_ahead():
    """Triton's cache, filled by one process for each core."""
    # Each process takes GPU memory: where several run tests, they share the cores.
    num_testers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    num_workers = max(1, os.cpu_count() // num_testers)
    workers = ProcessPoolExecutor(num_workers, get_context("spawn"))
    with workers as pool:
        list(pool.map(launch_attention, ATTENTION_CASES))


@on_gpu
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=str)
def test_attention_on_a_gpu(case, compiled_ahead):
    lens = LENS[case["lens"]](np.random.default_rng())
    check_attention(
        *lens, *case["heads"], case["head_dim"], case["block_size"], case["dtype"], CUDA
    )


# Decodes from the projection


def check_projected(
    context_lens, heads, kv_heads, head_dim, block_size, dtype, device, norm, **kwargs
):
    """attend_projected; and again with the same list of work when all sequences are longer."""
    context_lens = np.array(context_lens)
    ones, scale = np.ones_like(context_lens), head_dim**-0.5
    oldest = TritonAttention.steps_per_list - 1
    _, kv, step = paged_case(
        ones, context_lens + oldest, heads, kv_heads, head_dim, block_size, dtype, device, **kwargs
    )
    rows, tables = step.rows, step.tables
    query_start = np.arange(len(rows) + 1)
    step.attention.max_projected = len(rows)
    step.arrays = step.attention.host_arrays(
        Queries(tables, rows, query_start, ones, context_lens, len(rows), None)
    )
    table = Rope(RopeConfig(10000.0), head_dim, int(context_lens.max()) + oldest).table.to(device)
    weights = torch.randn(2, head_dim, device=device).to(dtype).unbind() if norm else None
    exact_weights = tuple(w.double() for w in weights) if weights else None
    for longer in (0, oldest):
        positions = context_lens + longer - 1
        all_slots = tables[rows, positions // block_size].astype(np.int64) * block_size
        all_slots += positions % block_size
        slots = torch.from_numpy(all_slots).to(device)
        exact_step = replace(
            step, positions=positions, context_lens=positions + 1, slots=all_slots, list_age=longer
        )
        # The last one's block is shared, and has the key already.
        new_slots = np.append(all_slots[:-1], -1)
        batch = replace(exact_step, slots=new_slots).batch
        qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
        exact_kv, old = KVLayer(kv.k.double(), kv.v.double()), (kv.k.clone(), kv.v.clone())
        rotary = Rotary(exact_weights, 1e-6, table)
        exact_q = reference.qk_norm_rope_store(qkv.double(), rotary, exact_step.batch, exact_kv)
        exact = attention_in_float64(exact_q, exact_kv, exact_step, scale)
        rotary = Rotary(weights, 1e-6, table)
        out = step.attention.attend_projected(qkv, rotary, kv, batch, scale)
        # Queries and the new keys are rounded as well.
        assert relative_error(out, exact) < 2 * tolerance(dtype)
        kept = torch.ones(kv.k.shape[:2], dtype=torch.bool, device=device)
        kept.view(-1)[slots[:-1]] = False
        for cache, before, expected in zip(
            (kv.k, kv.v), old, (exact_kv.k, exact_kv.v), strict=True
        ):
            assert len(rows) == 1 or (
                relative_error(cache[~kept], expected[~kept]) < tolerance(dtype)
            )
            torch.testing.assert_close(cache[kept], before[kept], rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("num_sms", [1, 60])
@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, block_size",
    [(4, 2, 32, 16), (14, 2, 20, 64), (3, 3, 80, 5), (24, 1, 16, 256)],
)
def test_decodes_from_the_projection_interpreted(
    heads, kv_heads, head_dim, block_size, num_sms, norm
):
    check_projected(
        [1, 2, 129, 300, 64, 65], heads, kv_heads, head_dim, block_size, torch.float32, CPU, norm,
        num_sms=num_sms,
    )  # fmt: skip


PROJECTED_CASES = pairwise(
    heads=[(16, 8), (32, 8), (14, 2), (9, 3), (24, 1)],
    head_dim=[64, 80, 128, 256],
    block_size=[16, 64, 256, 48],
    dtype=[torch.bfloat16, torch.float16, torch.float32],
    lens=["decodes", "crowd", "one", "skewed"],
    norm=[False, True],
)


@on_gpu
@pytest.mark.parametrize("case", PROJECTED_CASES, ids=str)
def test_decodes_from_the_projection_on_a_gpu(case):
    _, lens = LENS[case["lens"]](np.random.default_rng())
    check_projected(
        lens, *case["heads"], case["head_dim"], case["block_size"], case["dtype"], CUDA,
        case["norm"],
    )  # fmt: skip


# Norms, SiLU


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 48), (7, 1024), (5, 5120), (33, 100)])
def test_norms_and_silu(device, dtype, shape):
    x, other = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[1], device=device).to(dtype)

    def norm(x):
        x = x.double()
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    out = triton_ops.rms_norm(x, weight, 1e-6)
    assert relative_error(out, norm(x)) < tolerance(dtype)

    gate, up = x.double().repeat(1, 3), other.double().repeat(1, 3)
    out = triton_ops.silu_and_mul(torch.cat((gate, up), -1).to(dtype))
    assert relative_error(out, gate * gate.sigmoid() * up) < tolerance(dtype)


# Products


ROWS = (0, 1, 3, 4, 5, 16, 50, 70, 140)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size, num_out, norm, gated, has_bias",
    [
        (48, 7, 1, 0, 0),
        (48, 7, 1, 1, 1),
        (1024, 96, 1, 1, 0),
        (5000, 33, 0, 0, 1),
        (4096, 300, 0, 0, 1),
    ],
)
def test_linear(device, dtype, size, num_out, norm, gated, has_bias):
    def tensor(*shape):
        return torch.randn(shape, device=device).to(dtype)

    weight = tensor(num_out * (1 + gated), size) / size**0.5
    bias = tensor(len(weight)) if has_bias else None
    norm_weight = tensor(size)
    for rows in ROWS[:5]:
        x = tensor(rows, size)
        exact = x.double()
        if norm:
            exact = exact * (exact.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm_weight
        exact = exact @ weight.double().T + (bias if has_bias else 0)
        if gated:
            gate, up = exact.chunk(2, -1)
            exact = gate * gate.sigmoid() * up
        parts = (norm_weight, 1e-6) if norm else None
        fuses = triton_linear.fuses(weight, rows)
        if norm and not fuses:  # as layers/linear.py does
            x, parts = triton_ops.rms_norm(x, *parts), None
        out = triton_linear.linear(x, weight, bias, parts, bool(gated and fuses))
        if gated and not fuses:
            out = triton_ops.silu_and_mul(out)
        assert out.shape == (rows, num_out) and out.dtype == dtype
        # Not fused it is rounded after the norm, the product and the gate.
        assert rows == 0 or relative_error(out, exact) < (1 + norm + gated) * tolerance(dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "size, num_out, has_bias",
    [(5000, 33, 1), (3072, 64, 0), (2048, 128, 0), (1100, 96, 0), (90, 129, 0)],
)
def test_a_product_is_added(device, dtype, size, num_out, has_bias):
    def tensor(*shape):
        return torch.randn(shape, device=device).to(dtype)

    weight = tensor(num_out, size) / size**0.5
    bias = tensor(num_out) if has_bias else None
    for rows in ROWS:
        x, total = tensor(rows, size), tensor(rows, num_out)
        exact = total.double() + x.double() @ weight.double().T + (bias if has_bias else 0)
        triton_linear.add_linear(total, x, weight, bias)
        assert rows == 0 or relative_error(total, exact) < tolerance(dtype)


# Query and key norms, RoPE, store


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("heads, kv_heads, head_dim", [(6, 2, 20), (16, 8, 128), (9, 3, 64)])
def test_qk_norm_rope_store(device, dtype, norm, heads, kv_heads, head_dim):
    num_tokens, block_size = 21, 16
    slots = torch.randperm(4 * block_size)[:num_tokens]
    slots[3] = -1
    positions = torch.randint(0, 500, (num_tokens,), device=device)
    batch = ForwardBatch(None, positions, (BatchGroup(None, slots.to(device), None, {}),))
    old = torch.randn(2, 4, block_size, kv_heads, head_dim, device=device).to(dtype)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device).to(dtype)
    weights = torch.randn(2, head_dim, device=device).to(dtype).unbind() if norm else None
    table = Rope(RopeConfig(10000.0), head_dim, 512).table.to(device)
    kv, exact_kv = KVLayer(*old.clone()), KVLayer(*old.double())
    q = triton_ops.qk_norm_rope_store(qkv, Rotary(weights, 1e-6, table), batch, kv)
    exact_weights = tuple(w.double() for w in weights) if weights else None
    rotary = Rotary(exact_weights, 1e-6, table)
    exact = reference.qk_norm_rope_store(qkv.double(), rotary, batch, exact_kv)
    assert relative_error(q, exact) < tolerance(dtype)
    assert relative_error(kv.k, exact_kv.k) < tolerance(dtype)
    assert torch.equal(kv.v, exact_kv.v.to(dtype))
    untouched = torch.ones(4 * block_size, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    for cache, before in ((kv.k, old[0]), (kv.v, old[1])):
        assert torch.equal(cache.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads, head_dim", [(2, 20), (8, 128), (3, 64), (12, 128)])
def test_store(device, dtype, kv_heads, head_dim):
    """Keys as a part of a projection's row, values by themselves or in another order."""
    num_tokens, block_size = 21, 16
    slots = torch.randperm(4 * block_size, device=device)[:num_tokens]
    slots[3] = -1
    old = torch.randn(2, 4, block_size, kv_heads, head_dim, device=device).to(dtype)
    k = torch.randn(num_tokens, 3 * kv_heads, head_dim, device=device).to(dtype)[
        :, kv_heads:-kv_heads
    ]
    v = torch.randn(kv_heads, num_tokens, head_dim, device=device).to(dtype).transpose(0, 1)
    for values in (v, v.contiguous()):
        kv, expected = KVLayer(*old.clone()), KVLayer(*old.clone())
        triton_ops.store(k, values, kv, slots)
        reference.store(k, values, expected, slots)
        assert torch.equal(kv.k, expected.k) and torch.equal(kv.v, expected.v)
    triton_ops.store(k[:0], v[:0], kv, slots[:0])


# Sampling


def assert_drawn_by(logits, temperature, keys, token_ids):
    """In float64, the drawn block's log-probability with its noise is the best of the row, and the
    token's the best of the block, up to ties within float32's rounding."""
    vocab = logits.shape[1]
    scaled = logits.double() / temperature[:, None].double()
    blocks = [block.logsumexp(-1) for block in scaled.split(VOCAB_BLOCK, dim=1)]
    ids = torch.arange(vocab, device=logits.device)
    block_of, block = ids // VOCAB_BLOCK, token_ids[:, None] // VOCAB_BLOCK
    by_block = torch.stack(blocks, 1)
    by_block += gumbel_noise(keys, -1 - ids[: len(blocks)])
    by_token = scaled + gumbel_noise(keys, ids)
    by_token[block_of != block] = -torch.inf
    for values, index in ((by_block, block), (by_token, token_ids[:, None])):
        drawn = values.gather(1, index).squeeze(1)
        torch.testing.assert_close(drawn, values.amax(1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [50, 4096, 10_001])
def test_draws_equal_the_references(device, dtype, vocab):
    logits = (torch.randn(30, vocab, device=device) * 3).to(dtype)
    logits[7] = 0.0  # all alike: greedy takes the first
    logits[8:12, : vocab // 2] = -torch.inf
    logits[10:14, 1 - vocab // 3 :] = -torch.inf
    temperature = torch.linspace(0.2, 2.0, 30, device=device)
    temperature[::7] = 0.0
    keys = torch.from_numpy(noise_keys(np.arange(30, dtype=np.uint64), np.arange(30))).to(device)
    random = temperature > 0
    drawn = triton_sampling.sample(logits, temperature, keys)
    expected = reference_sampling.sample(logits, temperature, keys)
    assert (drawn != expected).sum() <= 1  # a tie
    for token_ids in (drawn, expected):
        assert torch.equal(token_ids[~random], logits[~random].float().argmax(-1))
        assert token_ids[7] == 0
        assert_drawn_by(logits[random], temperature[random], keys[random], token_ids[random])

    limits = dict(
        top_k=torch.full((30,), vocab, device=device),
        top_p=torch.full((30,), 1.0, device=device),
        min_p=torch.full((30,), 0.0, device=device),
    )
    assert torch.equal(triton_sampling.sample(logits, temperature, keys, **limits), drawn)
    limits["top_k"][5:15] = 1
    cut = triton_sampling.sample(logits, temperature, keys, **limits)
    assert torch.equal(cut[:5], drawn[:5]) and torch.equal(cut[15:], drawn[15:])
    best = logits.amax(-1)
    assert torch.equal(logits.gather(1, cut[:, None]).squeeze(1)[5:15], best[5:15])


SAMPLES = pytest.mark.parametrize("sample", [triton_sampling.sample, reference_sampling.sample])


def keys_for(token, bits):
    """Keys for which an id's noise is made of these bits. The second is found backwards: murmur3's
    finalizer undone for the bits, and done for what the first has made of the id."""
    multipliers = 0x85EBCA6B, 0xC2B2AE35
    x = (token * 0x9E3779B9 + 12345) % 2**32
    for shift, multiplier in zip((16, 13), multipliers, strict=True):
        x = (x ^ (x >> shift)) * multiplier % 2**32
    bits ^= bits >> 16
    bits = bits * pow(multipliers[1], -1, 2**32) % 2**32
    bits ^= (bits >> 13) ^ (bits >> 26)
    bits = bits * pow(multipliers[0], -1, 2**32) % 2**32
    return [12345, (x ^ (x >> 16)) ^ (bits ^ (bits >> 16))]


@SAMPLES
@pytest.mark.parametrize("device", DEVICES)
def test_masked_tokens_are_not_drawn_whatever_the_noise(device, sample):
    """The only token that is left wins with the lowest noise, for itself or its block, and against
    the highest for another."""
    logits = torch.full((4, 13_000), -torch.inf, device=device)
    logits[:, 5000] = 0.0
    ids = torch.tensor([5000, -2, 5001, -1], device=device)
    bits = torch.tensor([2**32 - 1, 2**32 - 1, 0, 0], device=device)
    keys = torch.tensor(list(map(keys_for, ids.tolist(), bits.tolist())), device=device)
    assert torch.equal(gumbel_noise(keys, ids).diag(), gumbel_of_bits(bits))
    token_ids = sample(logits, torch.ones(4, device=device), keys)
    assert token_ids.tolist() == [5000] * 4


@SAMPLES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_temperatures_take_the_best_token(device, dtype, sample):
    """1e-40 has no reciprocal in float32."""
    logits = (torch.randn(5, 9001, device=device) * 1e4).to(dtype)
    best = torch.tensor([0, 1, 4096, 8191, 9000], device=device)
    logits[torch.arange(5), best] = 1e6
    keys = torch.from_numpy(noise_keys(np.arange(5, dtype=np.uint64), np.arange(5))).to(device)
    for temperature in (0.0, 1e-40, 1e-6):
        token_ids = sample(logits, torch.full((5,), temperature, device=device), keys)
        assert torch.equal(token_ids, best)


@SAMPLES
@pytest.mark.parametrize("device", DEVICES)
def test_greedy_takes_the_first_of_the_best(device, sample):
    logits = torch.zeros(4, 10_001, device=device)
    logits[0, [9000, 5000, 5001]] = 1.0
    logits[1, [10_000, 4095]] = 1.0
    logits[2, [8192, 8191]] = torch.inf
    logits[3, 4096:] = 1e-40
    keys = torch.full((4, 2), 2**32 - 1, device=device)
    token_ids = sample(logits, torch.zeros(4, device=device), keys)
    assert token_ids.tolist() == [5000, 4095, 8191, 4096]


@SAMPLES
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("vocab", [50, 9001])
def test_whatever_the_logits_the_token_exists(device, vocab, sample):
    nan, inf = torch.nan, torch.inf
    logits = torch.full((5, vocab), nan, device=device)
    logits[1], logits[2], logits[3, ::2] = -inf, inf, 1.0
    logits[4] = 0.0
    logits[4, vocab - 2] = inf  # is certain
    for temperature in (0.0, 1e-6, 1.0):
        for key in (0, 2**32 - 1):
            keys = torch.full((5, 2), key, device=device)
            token_ids = sample(logits, torch.full((5,), temperature, device=device), keys)
            assert ((token_ids >= 0) & (token_ids < vocab)).all()
            assert token_ids[4] == vocab - 2
