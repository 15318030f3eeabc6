"""Sampling: the distribution that is drawn from, what is cut off, and what a draw depends on."""

import numpy as np
import pytest
import torch
from row_sampling import RowSampling
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanovllm import ops
from nanovllm.core.step import RowStart
from nanovllm.ops.reference_rows import noise_keys
from nanovllm.ops.reference_sampling import VOCAB_BLOCK, gumbel_noise, gumbel_of_bits, keep_likely
from nanovllm.sampling_params import SamplingParams


def draw(logits, num_draws, temperature=1.0, seed=1, **cuts):
    """How often each token is drawn at the positions of one seed."""
    keys = torch.from_numpy(noise_keys(np.full(num_draws, seed, np.uint64), np.arange(num_draws)))
    cuts = {name: torch.full((num_draws,), value) for name, value in cuts.items()}
    tokens = ops.sample(
        logits.expand(num_draws, -1), torch.full((num_draws,), temperature), keys, **cuts
    )
    return torch.bincount(tokens, minlength=len(logits)).double()


def chi_square(counts, probs):
    """Of mean 0 and deviation 1 if `probs` is what was drawn from."""
    expected = probs * counts.sum()
    assert counts[probs == 0].sum() == 0
    rare = expected < 1  # one cell together
    counts, expected = (
        torch.cat((x[~rare], x[rare].sum()[None])) if rare.any() else x for x in (counts, expected)
    )
    freedom = int((expected > 0).sum()) - 1
    statistic = ((counts - expected) ** 2 / expected)[expected > 0].sum()
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("seed", [0, 1, 2**63])
def test_draws_follow_the_softmax(temperature, seed):
    logits = torch.linspace(-1.5, 1.5, 40)
    counts = draw(logits, 40_000, temperature, seed)
    assert abs(chi_square(counts, (logits.double() / temperature).softmax(0))) < 4


def flat(vocab):
    return torch.linspace(-1.5, 1.5, vocab)[torch.randperm(vocab)]


def peaked(vocab):
    """A few likely tokens, and a tail of many unlikely ones."""
    logits = torch.zeros(vocab)
    logits[:: vocab // 7] = vocab**0.5 / 10
    return logits


def masked(vocab):
    """Whole blocks and the ends of others can't be drawn."""
    logits = flat(vocab)
    logits[: VOCAB_BLOCK + 50] = logits[-100:] = logits[vocab // 2 :: 2] = -torch.inf
    return logits


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(
    "logits_of, vocab",
    [(flat, 2000), (flat, VOCAB_BLOCK), (flat, 9001), (peaked, 12_289), (masked, 10_001)],
)
def test_draws_of_large_vocabularies_follow_the_softmax(logits_of, vocab, temperature):
    torch.manual_seed(0)
    logits = logits_of(vocab)
    probs = (logits.double() / temperature).softmax(0)
    counts = draw(logits, 20_000, temperature)
    assert abs(chi_square(counts, probs)) < 4
    by_block = [torch.stack([part.sum() for part in x.split(VOCAB_BLOCK)]) for x in (counts, probs)]
    assert vocab <= VOCAB_BLOCK or abs(chi_square(*by_block)) < 4


@pytest.mark.parametrize("cuts", [dict(top_k=5), dict(top_p=0.6), dict(min_p=0.3)])
def test_draws_follow_the_cut_softmax(cuts):
    logits = torch.linspace(-1.5, 1.5, 40)
    counts = draw(logits, 20_000, **cuts)
    tensors = {name: torch.tensor([value]) for name, value in cuts.items()}
    kept = keep_likely(logits[None], **{"top_k": None, "top_p": None, "min_p": None, **tensors})
    probs = kept[0].double().softmax(0)
    assert 0 < (probs > 0).sum() < 40
    assert abs(chi_square(counts, probs)) < 4


def test_noise_is_gumbel_distributed_over_ids():
    noise = gumbel_noise(torch.tensor([[12345, 67890]]), torch.arange(-100_000, 100_000))
    noise = noise[0].double().sort()[0]
    quantile = (torch.arange(200_000).double() + 0.5) / 200_000
    distance = (torch.exp(-torch.exp(-noise)) - quantile).abs().max()
    assert distance < 1.95 / 200_000**0.5  # Kolmogorov-Smirnov at 0.1%


def test_the_noises_upper_tail_keeps_all_bits():
    bits = torch.tensor([0, 1, 2, 1000, 2**31])
    exact = -torch.log(-torch.log1p(-(bits.double() + 0.5) / 2**32))
    torch.testing.assert_close(gumbel_of_bits(bits), exact.float())
    assert exact[0] > 22
    assert -3 < gumbel_of_bits(torch.tensor([2**32 - 1])) < -2.5


def test_noise_of_different_keys_is_uncorrelated():
    tokens = torch.arange(100_000)
    keys = torch.from_numpy(noise_keys(np.array([7, 7, 8], np.uint64), np.array([0, 1, 0])))
    of_blocks = gumbel_noise(keys, -1 - tokens)
    noise = torch.cat((gumbel_noise(keys, tokens), of_blocks))
    correlation = torch.corrcoef(noise) - torch.eye(6)
    assert correlation.abs().max() < 4 / 100_000**0.5


def test_noise_of_blocks_is_independent_of_their_tokens():
    positions = np.arange(20_000)
    keys = torch.from_numpy(noise_keys(np.full(20_000, 7, np.uint64), positions))
    for block in (0, 1, 30):
        ids = torch.tensor([-1 - block, *(block * VOCAB_BLOCK + i for i in range(6))])
        noise = gumbel_noise(keys, ids).double()
        correlation = torch.corrcoef(torch.cat((noise, noise.roll(1, 0)), 1).T) - torch.eye(14)
        assert correlation.abs().max() < 4 / 20_000**0.5
        # Whether a block's noise is high says nothing about which of its tokens has the highest.
        high = noise[:, 0] > noise[:, 0].median()
        counts = torch.bincount(noise[high, 1:].argmax(1), minlength=6).double()
        assert abs(chi_square(counts, torch.full((6,), 1 / 6).double())) < 4


@pytest.mark.parametrize("top_k", [1, 3, 30, 64])
@pytest.mark.parametrize("top_p", [0.05, 0.7, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 0.1, 1.0])
def test_cuts_equal_transformers(top_k, top_p, min_p):
    logits = torch.randn(8, 64) * 3
    expected = logits
    for warper in (
        MinPLogitsWarper(min_p=min_p) if min_p > 0 else None,
        TopKLogitsWarper(top_k=top_k),
        TopPLogitsWarper(top_p=top_p) if top_p < 1 else None,
    ):
        expected = warper(None, expected) if warper else expected
    kept = keep_likely(
        logits, torch.full((8,), top_k), torch.full((8,), top_p), torch.full((8,), min_p)
    )
    assert torch.equal(kept, expected)


@pytest.mark.parametrize("vocab", [50, 10_001])
def test_a_draw_does_not_depend_on_the_batch(vocab):
    rng = np.random.default_rng(0)
    params = [SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m)
              for t, p, k, m in [(0, 1, 0, 0), (1, 1, 0, 0), (0.7, 0.8, 0, 0), (2, 1, 5, 0),
                                 (1.5, 1, 0, 0.2), (0.8, 0.9, 20, 0.01)]]  # fmt: skip
    sampling = RowSampling(params, vocab)
    logits = torch.randn(6, vocab)
    positions = np.arange(6) + 3
    together = sampling.sample(logits, np.arange(6), positions)
    order = rng.permutation(6)
    assert torch.equal(sampling.sample(logits[order], order, positions[order]), together[order])
    for row in range(6):
        part = slice(row, row + 1)
        alone = sampling.sample(logits[part], np.array([row]), positions[part])
        assert alone == together[row]
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("vocab", [50, 10_001])
def test_limits_of_the_rows_are_the_references(vocab):
    """Of rows with limits of all kinds, beside rows without."""
    params = [
        SamplingParams(temperature=t, top_p=p, top_k=k, min_p=m)
        for t in (0, 0.7, 1.5)
        for p in (1, 0.6)
        for k in (0, 7)
        for m in (0, 0.1)
    ]
    n = len(params)
    rows, positions = np.arange(n), np.arange(n) + 9
    sampling = RowSampling(params, vocab)
    assert sampling.rows.limited.tolist() == [
        p.temperature > 0 and (p.top_p < 1 or p.top_k > 0 or p.min_p > 0) for p in params
    ] + [False]
    logits = torch.randn(n, vocab) * 2
    found = sampling.sample(logits, rows, positions)
    temperature = torch.tensor([p.temperature for p in params])
    seeds = np.arange(n, dtype=np.uint64) + 100
    kept = keep_likely(
        logits / temperature.clamp(min=1e-3)[:, None],
        torch.tensor([p.top_k or vocab for p in params]),
        torch.tensor([p.top_p for p in params], dtype=torch.float32),
        torch.tensor([p.min_p for p in params], dtype=torch.float32),
    )
    cut = logits.masked_fill(kept == -torch.inf, -torch.inf)
    expected = ops.sample(cut, temperature, torch.from_numpy(noise_keys(seeds, positions)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_others_warpers_do_not_change_a_draw(dtype):
    vocab = 10_001
    logits = (torch.randn(40, vocab) * 2).to(dtype)
    temperature = torch.linspace(0.05, 2, 40)
    keys = torch.from_numpy(noise_keys(np.arange(40, dtype=np.uint64), np.arange(40)))
    plain = ops.sample(logits, temperature, keys)
    top_k, top_p, min_p = torch.full((40,), vocab), torch.ones(40), torch.zeros(40)
    top_k[3], top_p[4], min_p[5] = 1, 0.1, 0.9
    beside = ops.sample(logits, temperature, keys, top_k, top_p, min_p)
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[3:6] = False
    assert torch.equal(beside[untouched], plain[untouched])


def test_stop_tokens_are_not_drawn_before_min_len():
    for temperature in (0.0, 1.0):
        sampling = RowSampling(
            [SamplingParams(temperature=temperature)] * 2, 50, stop_token_ids=(3, 4), min_len=10
        )
        logits = torch.zeros(2, 50)
        logits[:, 3:5] = 40.0
        tokens = sampling.sample(logits, np.array([0, 1]), np.array([9, 10]))
        assert tokens[0] not in (3, 4)
        assert tokens[1] in (3, 4)


def test_a_reused_row_forgets_its_former_parameters():
    sampling = RowSampling([SamplingParams(temperature=1.0, top_k=1, top_p=0.5, min_p=0.5)], 50)
    sampling.start([RowStart(0, 0, SamplingParams(temperature=1.0), 1, (), 0)])
    logits = torch.zeros(1, 50)
    logits[0, 7] = 1.0
    rows = np.array([0])
    tokens = {int(sampling.sample(logits, rows, np.array([i]))) for i in range(200)}
    assert len(tokens) > 20


def test_what_rows_need_beside_a_plain_draw_is_known():
    rows, positions = np.array([0]), np.array([5])

    def needs(stop_token_ids=(3,), min_len=0, **params):
        sampling = RowSampling([SamplingParams(**params)], 50, stop_token_ids, min_len)
        state = sampling.rows
        changes = bool(state.changes(rows, positions)[0])
        assert state.any_limited == state.limited[0] and state.any_changed == changes
        found = "limits" * bool(state.limited[0]) + "logits" * changes
        sampling.start([RowStart(0, 0, SamplingParams(temperature=1.0), 1, stop_token_ids, 0)])
        assert not (state.any_limited or state.any_changed or state.any_logprobs)
        return found

    assert needs(temperature=1.0) == needs(temperature=0.0, top_p=0.5) == ""
    assert needs(temperature=1.0, top_k=50) == ""  # all there are
    assert needs(temperature=1.0, top_k=49) == "limits"
    assert needs(temperature=1.0, top_p=0.9) == "limits"
    assert needs(temperature=1.0, min_p=0.1) == "limits"
    assert needs(temperature=1.0, min_len=9) == "logits"
    assert needs(temperature=1.0, min_len=9, stop_token_ids=()) == ""
    assert needs(temperature=1.0, logprobs=5) == ""  # of the logits that it was drawn from
