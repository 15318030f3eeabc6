"""Every family against transformers on the same weights: logits as close to float64 logits as
transformers' own float32 comes, and the same greedy tokens."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    LLAMA3_ROPE,
    edit_config,
    engine_logits,
    load_oracle,
    make_checkpoint,
    oracle_greedy,
    oracle_logits,
)

from nanovllm import LLM, SamplingParams

THETA_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
TINY = Path(__file__).parents[2] / "assets" / "tiny-qwen3"
# family, query heads, key/value heads, head_dim, what else config.json says
CASES = {
    "qwen3": ("qwen3", 4, 2, 16, dict(tie_word_embeddings=True)),
    "qwen3-mha-untied": ("qwen3", 5, 5, 20, dict(tie_word_embeddings=False)),
    "qwen3-gqa4-bias": ("qwen3", 8, 2, 48, dict(attention_bias=True)),
    "qwen2": ("qwen2", 3, 1, 16, dict(tie_word_embeddings=True)),
    "qwen2-gqa4-untied": ("qwen2", 4, 1, 80, dict(tie_word_embeddings=False)),
    "llama": ("llama", 9, 3, 20, dict(tie_word_embeddings=True)),
    "llama-mha-untied": ("llama", 5, 5, 80, dict(tie_word_embeddings=False)),
    "llama-bias": ("llama", 4, 2, 48, dict(attention_bias=True, mlp_bias=True)),
    "llama-llama3-rope": ("llama", 4, 2, 16, dict(rope_parameters=LLAMA3_ROPE)),
    "llama-theta": ("llama", 4, 2, 16, dict(rope_parameters=THETA_ROPE)),
}  # fmt: skip


def build(folder, case):
    family, heads, kv_heads, head_dim, extra = CASES[case]
    if family == "qwen2":  # its head_dim is hidden_size / heads
        extra = {**extra, "hidden_size": heads * head_dim}
    else:
        extra = {**extra, "hidden_size": heads * 8, "head_dim": head_dim}
    return make_checkpoint(
        folder, family, num_attention_heads=heads, num_key_value_heads=kv_heads, **extra
    )


def small_llm(folder, **options):
    defaults = dict(dtype="float32", skip_tokenizer_init=True, max_model_len=256, max_num_seqs=16)
    return LLM(str(folder), **{**defaults, **options})


def random_prompts(num, vocab, low=1, high=60, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab) for _ in range(rng.randint(low, high))] for _ in range(num)]


def assert_logits_as_near(logits, folder, token_ids):
    """Some random models magnify rounding: how much, transformers shows."""
    theirs = oracle_logits(load_oracle(folder), token_ids)
    exact = oracle_logits(load_oracle(folder).double(), token_ids)
    allowed = 1e-5 + 2 * (theirs - exact).abs().max().item()
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=allowed)


def assert_greedy_equal(llm, oracle, prompts, num_tokens=12):
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output["token_ids"] == oracle_greedy(oracle, prompt, num_tokens)


@pytest.mark.parametrize("case", CASES)
def test_family_equals_transformers(tmp_path, case):
    folder = build(tmp_path, case)
    llm, oracle = small_llm(folder), load_oracle(folder)
    prompts = random_prompts(4, 128)
    token_ids = random_prompts(1, 128, 90, 100)[0]
    for chunk in (100, 7):
        assert_logits_as_near(engine_logits(llm, token_ids, chunk), folder, token_ids)
    assert_greedy_equal(llm, oracle, prompts)


def test_the_model_in_the_box_equals_transformers():
    token_ids = random_prompts(1, 2560, 150, 150)[0]
    with small_llm(TINY) as llm:
        for chunk in (150, 64):
            assert_logits_as_near(engine_logits(llm, token_ids, chunk), TINY, token_ids)


def test_rope_in_the_form_of_older_configs(tmp_path):
    """Before transformers 5, rope_theta stood beside rope_scaling."""
    folder = build(tmp_path, "llama-llama3-rope")
    oracle = load_oracle(folder)
    scaling = {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}
    theta = LLAMA3_ROPE["rope_theta"]
    edit_config(folder, rope_parameters=None, rope_scaling=scaling, rope_theta=theta)
    assert_greedy_equal(small_llm(folder), oracle, random_prompts(3, 128))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": None, "use_sliding_window": True, "sliding_window": 4,
         "max_window_layers": 2},
        {"use_sliding_window": True, "sliding_window": 4},
    ],
)  # fmt: skip
def test_qwen3_without_head_dim_and_with_a_window_of_no_layer(tmp_path, change):
    folder = make_checkpoint(tmp_path, "qwen3", head_dim=128)
    edit_config(folder, head_dim=None, **change)
    assert_greedy_equal(small_llm(folder), load_oracle(folder), random_prompts(3, 128))


def test_sharded_checkpoint(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_greedy_equal(small_llm(folder), load_oracle(folder), random_prompts(3, 128))


def test_the_rope_table_is_exact_in_every_dtype(tmp_path):
    folder = build(tmp_path, "llama-theta")
    tables = [
        rope
        for dtype in ("float32", "bfloat16")
        for rope in small_llm(folder, dtype=dtype).apply_model(
            lambda model: model.model.layers[0].self_attn.rope
        )
    ]
    assert tables[1].table.dtype == torch.float32
    assert torch.equal(tables[0].table, tables[1].table)


def test_a_tied_head_in_the_checkpoint_must_equal_the_embedding(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3", tie_word_embeddings=True)
    weights = load_file(folder / "model.safetensors")
    head = weights["model.embed_tokens.weight"].clone()
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    small_llm(folder)
    head[3, 3] += 1
    save_file({**weights, "lm_head.weight": head}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight differs from the embedding"):
        small_llm(folder)


def test_integer_weights_are_refused(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen3")
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head.weight is in torch.int8: quantized"):
        small_llm(folder)


def test_bfloat16_logits_are_near_transformers(tmp_path):
    folder = build(tmp_path, "qwen3")
    llm, oracle = small_llm(folder, dtype="bfloat16"), load_oracle(folder)
    token_ids = random_prompts(1, 128, 90, 100)[0]
    ours = engine_logits(llm, token_ids, 100).float()
    exact = oracle_logits(oracle, token_ids)
    # Two layers of bf16 rounding; transformers' own bf16 model is the measure.
    theirs = oracle_logits(load_oracle(folder, torch.bfloat16), token_ids).float()
    assert (ours - exact).norm() < 1.5 * (theirs - exact).norm()
