"""Requests that change their logits: greedy tokens equal those from transformers' logits and
processors, however the engine gets there."""

import random
import re

import pytest
import torch
from conftest import TINY
from logits_oracle import asked_greedy
from tiny_models import load_oracle

from nanovllm import LLM, SamplingParams
from nanovllm.frontend.prompts import bind_params

pytestmark = pytest.mark.usefixtures("one_thread")
NUM_TOKENS = 14
ASKED = [
    dict(repetition_penalty=1.4),
    dict(presence_penalty=2.0),
    dict(frequency_penalty=1.1, presence_penalty=-0.5),
    dict(logit_bias={40: 6.0, 41: 7.0, 50: -float("inf")}, repetition_penalty=1.2),
    dict(allowed_token_ids=list(range(10, 200, 7)), frequency_penalty=0.8),
    dict(bad_words=["the", "and", "was", "he"]),
    dict(bad_words=["of the", "in the", ", and", "s", "it was"], repetition_penalty=1.1),
    dict(),
]


@pytest.fixture(scope="module")
def setting():
    """Parameters, prompts of which some share a prefix, and the oracle's tokens for them."""
    oracle = load_oracle(TINY)
    with LLM(str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        tokenizer, vocab_size = llm.get_tokenizer(), llm.model_config.vocab_size
    rng = random.Random(1)
    text = "In the beginning God created the heaven and the earth. And the earth was"
    shared = tokenizer(text)["input_ids"]
    prompts = [shared + [rng.randrange(200) for _ in range(n)] for n in (0, 3, 20, 1)]
    prompts += [list(shared), shared[:-2], shared[:5], shared + shared]
    params, expected = [], []
    for values, prompt in zip(ASKED, prompts, strict=True):
        params.append(
            SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, **values)
        )
        bound = SamplingParams(**values)
        bind_params(bound, vocab_size, tokenizer, 64)
        expected.append(asked_greedy(oracle, bound, prompt, NUM_TOKENS))
    return prompts, params, expected


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_num_batched_tokens=7, max_num_seqs=4),
        dict(max_num_seqs=2, enable_prefix_caching=False),
        dict(block_size=4, max_num_seqs=8, max_model_len=64, preempts=True),
    ],
    ids=["mixed", "chunks", "rows are reused", "preemption"],
)
def test_tokens_equal_transformers(setting, options, depth, request):
    prompts, params, expected = setting
    options = {"kv_cache_memory_bytes": 4 << 20, "max_model_len": 96} | options
    if options.pop("preempts", False):
        request.getfixturevalue("crowded")
        del options["kv_cache_memory_bytes"]
        options["num_gpu_blocks_override"] = 24
    with LLM(str(TINY), dtype="float32", async_scheduling=depth == 2, **options) as llm:
        for order in (range(8), range(7, -1, -1)):  # cold, then warm
            batch = [prompts[i] for i in order], [params[i] for i in order]
            outputs = llm.generate(*batch, use_tqdm=False)
            assert [out["token_ids"] for out in outputs] == [expected[i] for i in order]
        metrics = llm.llm_engine.metrics
        assert (metrics.cached_tokens > 0) == options.get("enable_prefix_caching", True)
        assert (metrics.preemptions > 0) == ("num_gpu_blocks_override" in options)


def test_seeded_draws_are_the_same_in_any_batch(setting):
    prompts, params, _ = setting
    params = [
        SamplingParams(
            **{**values, "temperature": 0.9, "top_p": 0.9, "seed": 7, "ignore_eos": True}
        )
        for values in ASKED
    ]
    with LLM(str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [
            llm.generate(prompt, p, use_tqdm=False)[0]
            for prompt, p in zip(prompts, params, strict=True)
        ]
    assert [out["token_ids"] for out in together] == [out["token_ids"] for out in alone]


def test_bad_words_stay_out_of_the_text(llm):
    params = SamplingParams(temperature=0, max_tokens=30)
    prompt = "In the beginning"
    plain = llm.generate(prompt, params, use_tqdm=False)[0]["text"]
    words = re.findall(r"\w+", plain)[:4]
    for bad_words in (words[:1], words):
        params.bad_words = bad_words
        text = llm.generate(prompt, params, use_tqdm=False)[0]["text"]
        assert not set(bad_words) & set(re.findall(r"\w+", text)), (plain, text)


def bad_words_of(tokenizer, words, max_model_len=64, **values):
    params = SamplingParams(bad_words=words, **values)
    bind_params(params, 10**6, tokenizer, max_model_len)
    return params.bad_words_token_ids


def test_bad_words_are_tokens_at_the_beginning_after_a_space_and_a_line():
    ids = {"a": [1], " a": [9, 1], "ab": [3, 4], " ab": [5], "c": [6], " c": [6]}
    ids |= {"\n": [9, 7], "\na": [9, 7, 2], "\nab": [9, 7, 4, 3], "\nc": [8]}
    ids |= {" \n": [9, 9, 7], "\n\n": [9, 7, 7]}

    def sentencepiece(texts, add_special_tokens, **_):
        """Writes a space in front of a text."""
        assert add_special_tokens is False
        return {"input_ids": [ids[text] for text in texts]}

    found = bad_words_of(sentencepiece, ["a", " ab", "c", "a"])
    assert found == [[1], [9, 1], [2], [3, 4], [5], [4, 3], [6]]
    assert bad_words_of(sentencepiece, ["\n"]) == [[9, 7], [9, 9, 7], [7]]


def test_white_space_as_it_is_split_before_a_letter_is_a_bad_word():
    ids = {"\n": [7], "\n\n": [8], " \n\n": [9, 8], "\n\n\n": [6], "a": [1], "\n\na": [7, 7, 1]}

    def split_before_letters(texts, **_):
        return {"input_ids": [ids[text] for text in texts]}

    assert bad_words_of(split_before_letters, ["\n\n"]) == [[8], [9, 8], [7, 7]]


def test_bad_words_in_the_usual_place(llm):
    tokenizer = llm.get_tokenizer()
    for word in ("days", " days"):  # two tokens, or one after a space
        params = SamplingParams(temperature=0, max_tokens=8, bad_words=[word])
        assert "days" not in llm.generate("In the beginning", params, use_tqdm=False)[0]["text"]
        spellings = [tokenizer.encode("days"), tokenizer.encode(" days")]
        assert bad_words_of(tokenizer, [word]) == spellings
    for space in ("\n", " ", "\t", " \n"):
        assert tokenizer.encode(space) in bad_words_of(tokenizer, [space])


def test_bad_words_without_room_are_left_out_and_too_many_are_refused(llm):
    tokenizer = llm.get_tokenizer()
    long = "word " * 40_000
    assert bad_words_of(tokenizer, [long, "the"]) == bad_words_of(tokenizer, ["the"])
    assert bad_words_of(tokenizer, [long]) == []
    word = "It is a truth"
    size = len(tokenizer.encode(word))
    for most in (dict(max_tokens=size), dict(max_model_len=size + 1)):
        assert tokenizer.encode(word) in bad_words_of(tokenizer, [word], **most)
    for less in (dict(max_tokens=size - 1), dict(max_model_len=size)):
        assert tokenizer.encode(word) not in bad_words_of(tokenizer, [word], **less)
    with pytest.raises(ValueError, match=r"tokens and spellings may be 65536: leave some words"):
        bad_words_of(tokenizer, [f"word {i}" for i in range(9000)])


def test_thousands_of_bad_words_beside_other_requests(llm):
    words = [f"w{i}" for i in range(2000)] + ["word " * 40_000]
    others = SamplingParams(temperature=0, max_tokens=6)
    params = [SamplingParams(temperature=0, max_tokens=6, bad_words=words), others]
    outputs = llm.generate(["In the beginning"] * 2, params, use_tqdm=False)
    assert [out.outputs[0].finish_reason for out in outputs] == ["length"] * 2
    alone = llm.generate("In the beginning", others, use_tqdm=False)
    assert outputs[0]["text"] == outputs[1]["text"] == alone[0]["text"]


def test_generation_config_may_ask_for_a_penalty(copy_tiny):
    folder = copy_tiny(generation_config={"repetition_penalty": 1.25})
    with LLM(str(folder), dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        assert llm.get_default_sampling_params().repetition_penalty == 1.25


BAD = [
    (dict(presence_penalty=2.5), ValueError, "presence_penalty must be in [-2, 2]"),
    (dict(frequency_penalty=float("nan")), ValueError, "frequency_penalty must be in [-2, 2]"),
    (dict(repetition_penalty=0), ValueError, "repetition_penalty must be above 0 and finite"),
    (dict(repetition_penalty=float("inf")), ValueError, "repetition_penalty must be above 0"),
    (dict(repetition_penalty="x"), TypeError, "repetition_penalty must be a number, got 'x'"),
    (dict(logit_bias=[1]), TypeError, "logit_bias must be a dict of token id -> bias, got [1]"),
    (dict(logit_bias={"1": 1}), TypeError, "logit_bias's keys must be a list of token ids"),
    (dict(logit_bias={1: "1"}), TypeError, "a bias must be a number, got '1'"),
    (dict(logit_bias={1: float("nan")}), ValueError, "logit_bias must be finite or -inf"),
    (dict(allowed_token_ids=[]), ValueError, "allowed_token_ids is empty"),
    (dict(allowed_token_ids=[True]), TypeError, "allowed_token_ids must be a list of token ids"),
    (dict(bad_words="word"), TypeError, "bad_words must be a list of strings, got 'word'"),
    (dict(bad_words=["a", ""]), ValueError, "bad_words must not have an empty string"),
]


@pytest.mark.parametrize(("values", "error", "message"), BAD)
def test_bad_values_are_refused(values, error, message):
    with pytest.raises(error, match=re.escape(message)):
        SamplingParams(**values)


def test_what_the_vocabulary_does_not_have_is_refused_and_nothing_runs(llm):
    vocab = llm.model_config.vocab_size
    for values in (dict(logit_bias={vocab: 1.0}), dict(allowed_token_ids=[1, -1])):
        with pytest.raises(ValueError, match=rf"{next(iter(values))} has the token id .* outside"):
            llm.generate(["a", "b"], [SamplingParams(), SamplingParams(**values)])
    assert llm.is_finished()


def test_bad_words_need_a_tokenizer():
    params = SamplingParams(bad_words=["a"])
    with pytest.raises(ValueError, match="bad_words need a tokenizer"):
        bind_params(params, 10, None, 64)


def test_changing_parameters_after_admission_has_no_effect(llm):
    params = SamplingParams(temperature=0, logit_bias={5: 1.0}, allowed_token_ids=[5, 6])
    llm.add_request([1, 2], params)
    params.logit_bias[5], params.allowed_token_ids[:] = 0.0, [9]
    while not llm.is_finished():
        [out] = llm.step()
    assert set(out["token_ids"]) <= {5, 6}
    assert torch.tensor(out["token_ids"]).numel() == 16
