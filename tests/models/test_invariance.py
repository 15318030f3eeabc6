"""The same greedy tokens in float32 however the engine gets there: chunks, blocks, prefix hits,
preemption, batches, overlap."""

import random
from pathlib import Path

import pytest
from tiny_models import load_oracle, make_checkpoint, oracle_greedy

from nanovllm import LLM, SamplingParams

TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3"
NUM_TOKENS = 20
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=["random llama", "model in the box"])
def setting(request, tmp_path_factory):
    """A checkpoint, prompts of which some share prefixes, and the oracle's tokens for them."""
    if request.param == "model in the box":
        folder = TINY
    else:
        folder = make_checkpoint(
            tmp_path_factory.mktemp("llama"),
            "llama",
            num_attention_heads=6,
            head_dim=20,
            hidden_size=48,
        )
    oracle = load_oracle(folder)
    rng = random.Random(1)
    shared = [rng.randrange(128) for _ in range(48)]
    prompts = [shared + [rng.randrange(128) for _ in range(n)] for n in (1, 5, 0, 30)]
    prompts += [shared[:32], shared[:33], list(shared)]
    prompts += [[rng.randrange(128) for _ in range(n)] for n in (1, 16, 17, 70)]
    return folder, prompts, [oracle_greedy(oracle, prompt, NUM_TOKENS) for prompt in prompts]


def run(folder, prompts, num_rounds=1, **options):
    """Tokens of each round, and the engine's counters."""
    defaults = dict(dtype="float32", skip_tokenizer_init=True, max_model_len=128, max_num_seqs=16)
    with LLM(str(folder), **{**defaults, **options}) as llm:
        rounds = [
            [output["token_ids"] for output in llm.generate(prompts, GREEDY, use_tqdm=False)]
            for _ in range(num_rounds)
        ]
        return rounds, llm.llm_engine.metrics


def page_bytes(folder, block_size):
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=16) as llm:
        return llm.model_config.kv_elements_per_token * 4 * block_size


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_page_sizes(setting, block_size):
    folder, prompts, expected = setting
    rounds, metrics = run(folder, prompts, 2, block_size=block_size)
    assert rounds == [expected, expected]
    assert metrics.cached_tokens > 0


@pytest.mark.parametrize("budget", [1, 5, 16, 61])
def test_chunk_sizes(setting, budget):
    folder, prompts, expected = setting
    rounds, _ = run(folder, prompts, max_num_batched_tokens=budget, max_num_seqs=min(budget, 16))
    assert rounds == [expected]


@pytest.mark.parametrize("enabled", [False, True])
def test_prefix_cache_off_cold_warm_and_within_a_batch(setting, enabled):
    folder, prompts, expected = setting
    rounds, metrics = run(
        folder, prompts + prompts, 3, enable_prefix_caching=enabled, max_num_seqs=32
    )
    assert rounds == [expected + expected] * 3
    assert (metrics.cached_tokens > 0) == enabled


def test_preemption(setting, crowded):
    folder, prompts, expected = setting
    cache = page_bytes(folder, 4) * 40  # one request of 128 tokens, and little more
    for prefix_caching in (True, False):
        rounds, metrics = run(
            folder,
            prompts,
            block_size=4,
            kv_cache_memory_bytes=cache,
            enable_prefix_caching=prefix_caching,
        )
        assert rounds == [expected]
        assert metrics.preemptions > 0


@pytest.mark.parametrize("max_num_seqs", [1, 2, 5])
def test_batch_sizes_and_order(setting, max_num_seqs):
    folder, prompts, expected = setting
    order = list(range(len(prompts)))
    random.Random(max_num_seqs).shuffle(order)
    rounds, _ = run(folder, [prompts[i] for i in order], max_num_seqs=max_num_seqs)
    assert rounds == [[expected[i] for i in order]]


def test_overlap(setting, crowded):
    folder, prompts, expected = setting
    cache = page_bytes(folder, 4) * 40
    rounds, metrics = run(
        folder, prompts, async_scheduling=True, block_size=4, kv_cache_memory_bytes=cache
    )
    assert rounds == [expected]
    assert metrics.preemptions > 0
