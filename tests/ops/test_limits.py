"""What top_k, top_p and min_p leave, and the most likely tokens, by the kernels that search for
them: interpreted where there is no GPU, compiled where there is one."""

import numpy as np
import pytest
import torch

from nanovllm.ops.reference_rows import noise_keys
from nanovllm.ops.triton import blocks as triton_blocks
from nanovllm.ops.triton import limits as triton_limits
from nanovllm.ops.triton import sampling as triton_sampling

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
DEVICES = [
    pytest.param(torch.device("cpu"), marks=interpreted),
    pytest.param(torch.device("cuda"), marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU, GPU = DEVICES
# Vocabulary, and the kernels' constants: tokens a group, and logits looked at instead of all. Small
# ones make small vocabularies take all ways. An interpreter takes seconds for large ones.
OWN, SMALL = None, (16, 64)
CASES = [
    pytest.param(*device.values, dtype, *size, marks=device.marks)
    for device, sizes in ((CPU, [(60, OWN)]), (GPU, [(60, OWN), (5000, SMALL)]))
    for size in sizes
    for dtype in DTYPES
] + [
    pytest.param(*CPU.values, torch.bfloat16, 2500, OWN, marks=CPU.marks),
    pytest.param(*CPU.values, torch.float32, 700, SMALL, marks=CPU.marks),
    pytest.param(*CPU.values, torch.float16, 700, SMALL, marks=CPU.marks),
    pytest.param(*GPU.values, torch.bfloat16, 5000, OWN, marks=GPU.marks),
]
NUM_ROWS = 18


@pytest.fixture
def set_constants(monkeypatch):
    def set_to(constants):
        if constants is not None:
            monkeypatch.setattr(triton_blocks, "GROUP", constants[0])
            monkeypatch.setattr(triton_limits, "CANDIDATES", constants[1])

    return set_to


def make_logits(vocab, dtype, device):
    """Of all kinds: spread, peaked, flat with many ties, around zero, huge, partly forbidden."""
    logits = torch.randn(NUM_ROWS, vocab) * torch.logspace(-2, 1.5, NUM_ROWS)[:, None]
    logits[3] = logits[3].round()
    logits[4] = 1.0
    logits[5] = torch.linspace(-1e-3, 1e-3, vocab)
    logits[6] += 1e4
    logits[7] -= 1e4
    logits[8, : vocab // 2] = logits[9, 3:] = -torch.inf
    logits[10, vocab // 3] = 60.0
    logits[11, 1::2], logits[11, ::2] = -0.0, 0.0
    logits[11, ::7] = 0.5
    logits[12:15] = logits[12:15].round()
    return logits.to(dtype).to(device)


def kept_by(logits, lowest, last):
    """The tokens that the kernel's result stands for, by the definition of its keys."""
    bits = logits.view(torch.int32 if logits.dtype == torch.float32 else torch.int16).int()
    keys = bits ^ ((bits >> 31) & (2**31 - 1 if logits.dtype == torch.float32 else 2**15 - 1))
    keys[keys == -1] = 0
    tokens = torch.arange(logits.shape[1], device=logits.device)
    lowest, last = lowest[:, None], last[:, None]
    return (keys > lowest) | ((keys == lowest) & (tokens <= last))


def check_kept(kept, logits, temperature, top_k, top_p, min_p):
    """One row's, in float64; tokens at the border of a sum or a ratio may fall on either side."""
    order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices
    scaled = (logits.double() - logits.double().max()) / temperature
    scaled[logits == logits.max()] = 0.0
    likely = scaled[order].exp()
    number = int(kept.sum())
    assert kept[order[:number]].all(), "not the most likely ones"

    def number_within(margin):
        left = max(1, min(top_k, int((likely >= min_p * (1 + margin)).sum())))
        sums = likely[:left].cumsum(0)
        before = (sums - likely[:left]) / sums[-1]
        return max(1, int((before < top_p * (1 - margin) - 1e-12).sum() if top_p < 1 else left))

    assert number_within(1e-4) <= number <= number_within(-1e-4)


@pytest.mark.parametrize("device, dtype, vocab, constants", CASES)
def test_what_is_kept(device, dtype, vocab, constants, set_constants):
    set_constants(constants)
    logits = make_logits(vocab, dtype, device)
    rng = np.random.default_rng(vocab)
    choices = {
        "top_k": [vocab, 1, 2, 7, 50, vocab // 2, vocab - 1],
        "top_p": [1.0, 1e-6, 0.1, 0.5, 0.9, 0.999],
        "min_p": [0.0, 0.0, 1e-6, 0.1, 1.0],
    }
    for _ in range(1 if device.type == "cpu" else 20):
        drawn = {name: rng.choice(values, NUM_ROWS) for name, values in choices.items()}
        temperature = torch.from_numpy(rng.choice([0.3, 1.0, 2.0], NUM_ROWS)).float().to(device)
        top_k = torch.from_numpy(drawn["top_k"]).to(device)
        top_p, min_p = (torch.from_numpy(drawn[n]).float().to(device) for n in ("top_p", "min_p"))
        limits = triton_limits.find_limits(logits, temperature, top_k, top_p, min_p)
        kept = kept_by(logits, *limits)
        for row in range(NUM_ROWS):
            of_row = (x[row].item() for x in (temperature, top_k, top_p, min_p))
            check_kept(kept[row].cpu(), logits[row].cpu(), *of_row)

        keys = noise_keys(np.arange(NUM_ROWS, dtype=np.uint64), np.arange(NUM_ROWS))
        keys = torch.from_numpy(keys).to(device)
        token_ids = triton_sampling.sample(logits, temperature, keys, top_k, top_p, min_p)
        masked = logits.masked_fill(~kept, -torch.inf)
        assert torch.equal(token_ids, triton_sampling.sample(masked, temperature, keys))


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_ask_for_nothing_keep_all(device):
    logits = make_logits(60, torch.float32, device)
    one = torch.ones(NUM_ROWS, device=device)
    top_k = torch.full((NUM_ROWS,), 60, device=device)
    assert kept_by(logits, *triton_limits.find_limits(logits, one, top_k, one, one * 0)).all()
    greedy = triton_limits.find_limits(logits, one * 0, top_k * 0 + 1, one * 0.5, one)
    assert kept_by(logits, *greedy).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_whatever_the_logits_a_token_is_found(device, value):
    logits = torch.full((3, 5000), value, device=device)
    logits[1, 7], logits[2, 5:] = 1.0, 2.0
    ones = torch.ones(3, device=device)
    limits = dict(top_k=torch.full((3,), 5, device=device), top_p=ones * 0.5, min_p=ones * 0.1)
    keys = torch.zeros(3, 2, dtype=torch.int64, device=device)
    token_ids = triton_sampling.sample(logits, ones, keys, **limits)
    assert ((token_ids >= 0) & (token_ids < 5000)).all()


@pytest.mark.parametrize("device, dtype, vocab, constants", CASES)
@pytest.mark.parametrize("num_top", [1, 20, 60])
def test_the_most_likely_tokens(device, dtype, vocab, constants, num_top, set_constants):
    set_constants(constants)
    logits = make_logits(vocab, dtype, device)
    token_ids = torch.randint(vocab, (NUM_ROWS,), device=device)
    token_ids[8:10] = logits[8:10].argmax(-1)
    ids, logprobs, ranks = triton_limits.top_logprobs(logits, token_ids, num_top)
    assert torch.equal(ids[:, 0], token_ids)
    ordered = logits.double().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(ids[:, 1:], ordered.indices[:, :num_top])
    exact = logits.double().log_softmax(-1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact.gather(1, ids), rtol=1e-6, atol=2e-3)
    small = logits.abs().amax(-1) < 200  # elsewhere float32 has few digits behind the point
    torch.testing.assert_close(
        logprobs[small].double(), exact.gather(1, ids)[small], rtol=1e-5, atol=1e-4
    )
    assert torch.equal(ranks, (logits >= logits.gather(1, token_ids[:, None])).sum(-1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_nan", [1, 30, 60])
def test_nan_among_the_logits_leaves_no_place_unwritten(device, num_nan, monkeypatch):
    """What memory held before would be taken for tokens, and decoded."""
    empty = torch.empty

    def unwritten(*args, **kwargs):
        return empty(*args, **kwargs).fill_(-1)

    logits = torch.randn(4, 60, device=device)
    logits[:, :num_nan] = torch.nan
    token_ids = torch.arange(4, device=device)
    with monkeypatch.context() as patch:
        patch.setattr(triton_limits.torch, "empty", unwritten)
        ids, _, _ = triton_limits.top_logprobs(logits, token_ids, 5)
    assert ((ids >= 0) & (ids < 60)).all()
    numbers = logits.nan_to_num(-torch.inf).topk(5).indices
    assert num_nan == 60 or torch.equal(ids[:, 1:], numbers)
