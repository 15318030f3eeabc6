"""Log-likelihoods of continuations and of whole texts, on the model in the box: transformers'
numbers, whatever runs beside, and nothing computed twice."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY
from tiny_models import load_oracle, oracle_logits

from nanovllm import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"dtype": "float32", "kv_cache_memory_bytes": 4 << 20}
CONTEXT = "In the beginning the king said unto them that the word was with the people of the land"
PAIRS = [
    (CONTEXT, " and the sea"),
    (CONTEXT, "."),
    (CONTEXT + " ", "of"),
    ("", " the king"),
    ("The king", " said unto him"),
    ([5], [6]),
    ([5, 6, 7, 8], [9, 10]),
    ([], [11, 12, 13]),
    (list(range(300, 340)), list(range(340, 365))),
]


@pytest.fixture(scope="module")
def oracle():
    return load_oracle(TINY)


@pytest.fixture(scope="module", params=[False, True], ids=["depth 1", "depth 2"])
def llm(request):
    options = dict(max_model_len=64, block_size=4, max_num_batched_tokens=24, max_num_seqs=6)
    with LLM(str(TINY), async_scheduling=request.param, **SMALL, **options) as llm:
        yield llm
        assert not llm.llm_engine.unfinished and not llm._thread.clients


def split(llm, context, continuation):
    """As lm-eval does."""
    tokenizer = llm.get_tokenizer()
    bos = [tokenizer.bos_token_id or tokenizer.eos_token_id]
    if isinstance(context, list):
        return context or bos, continuation
    if not context:
        return bos, tokenizer.encode(continuation)
    head, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
    return head, whole[len(head) :]


def check(oracle, found, context, continuation):
    logprobs = oracle_logits(oracle, context + continuation[:-1])[len(context) - 1 :].log_softmax(
        -1
    )
    expected = logprobs.gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
    assert found.token_ids == continuation
    assert found.logprobs == pytest.approx(expected, abs=1e-4)
    assert found.total == pytest.approx(sum(expected), abs=1e-3)
    assert found.perplexity == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-3)
    assert found.is_greedy == (logprobs.argmax(-1).tolist() == continuation)


def test_they_equal_transformers(llm, oracle):
    for _ in range(2):  # the second time contexts are in the cache
        found = llm.loglikelihood(PAIRS, use_tqdm=False)
        for pair, one in zip(PAIRS, found, strict=True):
            check(oracle, one, *split(llm, *pair))
    for pair, one in zip(PAIRS, found, strict=True):
        [alone] = llm.loglikelihood([pair], use_tqdm=False)
        assert alone.logprobs == pytest.approx(one.logprobs, abs=1e-4)
    assert llm.loglikelihood([]) == llm.loglikelihood_rolling([]) == []


def test_arrays_and_tensors_will_do(llm):
    [expected] = llm.loglikelihood([([5, 6], [7, 8])], use_tqdm=False)
    for pairs in (
        [(np.array([5, 6]), torch.tensor([7, 8]))],
        [((5, 6), [np.int64(7), np.int32(8)])],
        np.array([[[5, 6], [7, 8]]]),
    ):
        [found] = llm.loglikelihood(pairs, use_tqdm=False)
        assert found.token_ids == [7, 8]
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_greedy_is_what_greedy_decoding_gives(llm):
    params = SamplingParams(temperature=0, max_tokens=6)
    [out] = llm.generate(CONTEXT, params, use_tqdm=False)
    prompt, tokens = out.prompt_token_ids, out.outputs[0].token_ids
    pairs = [(prompt, tokens), (prompt, tokens[:1]), (prompt, [*tokens[:-1], 1 + tokens[-1] % 99])]
    found = llm.loglikelihood(pairs, use_tqdm=False)
    assert [one.is_greedy for one in found] == [True, True, False]


def test_contexts_are_computed_once(llm):
    context, metrics = list(range(400, 440)), llm.llm_engine.metrics
    before, cached = metrics.prefill_tokens, metrics.cached_tokens
    llm.loglikelihood([(context, [token, 9]) for token in range(10)], use_tqdm=False)
    assert metrics.prefill_tokens - before == 40 + 1 + 9 * (4 + 1)  # the last block, for its logits
    assert metrics.cached_tokens - cached == 9 * 36


def test_others_run_beside(llm, oracle):
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    [whole] = llm.generate("The king", params, use_tqdm=False)
    llm.add_request("The king", params)
    outputs = llm.step()
    [found] = llm.loglikelihood(PAIRS[:1], use_tqdm=False)
    check(oracle, found, *split(llm, *PAIRS[0]))
    while not llm.is_finished():
        outputs += llm.step()
    assert outputs[-1]["token_ids"] == whole["token_ids"]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 128, 129, 200])
def test_rolling_scores_every_token_once(llm, oracle, length):
    token_ids = [7 + i * i % 900 for i in range(length)]
    [found] = llm.loglikelihood_rolling([token_ids], use_tqdm=False)
    whole = split(llm, [], token_ids)[0] + token_ids
    logprobs = []
    for start in range(1, length + 1, 64):
        end = min(start + 64, length + 1)
        window = whole[max(0, end - 65) : end]
        lines = oracle_logits(oracle, window[:-1]).log_softmax(-1)[start - end :]
        logprobs += lines.gather(1, torch.tensor(whole[start:end])[:, None])[:, 0].tolist()
    assert found.token_ids == token_ids
    assert found.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_rolling_takes_texts(llm):
    texts = [CONTEXT * 5, "A", {"prompt": CONTEXT}]
    found = llm.loglikelihood_rolling(texts, use_tqdm=False)
    encode = llm.get_tokenizer().encode
    assert [one.token_ids for one in found] == [encode(t) for t in (CONTEXT * 5, "A", CONTEXT)]
    assert llm.loglikelihood_rolling("A", use_tqdm=False)[0].logprobs == pytest.approx(
        found[1].logprobs, abs=1e-4
    )
    assert math.prod(math.exp(-x) for x in found[2].logprobs) ** (
        1 / len(found[2].logprobs)
    ) == pytest.approx(found[2].perplexity)


@pytest.fixture
def bos(llm):
    """The tokenizer gets a token that begins texts; it adds none by itself."""
    llm.get_tokenizer().bos_token = "<|im_start|>"
    yield "<|im_start|>"
    llm.get_tokenizer().bos_token = None


def test_bos_is_not_doubled(llm, bos):
    tokenizer = llm.get_tokenizer()
    assert tokenizer.bos_token_id is not None
    pairs = [("", bos + "The king"), (bos + "The", " king"), ("", "The king")]
    found = llm.loglikelihood(pairs, use_tqdm=False)
    ids = tokenizer.encode("The king")
    assert found[0].token_ids == found[2].token_ids == ids
    assert found[0].logprobs == pytest.approx(found[2].logprobs, abs=1e-4)
    assert found[1].logprobs == pytest.approx(found[0].logprobs[-1:], abs=1e-4)
    [rolled] = llm.loglikelihood_rolling(bos + "The king", use_tqdm=False)
    assert rolled.logprobs == pytest.approx(found[0].logprobs, abs=1e-4)


def test_bad_input_is_refused_before_anything_runs(llm):
    good, steps = ([5], [6]), llm.llm_engine.metrics.steps
    for pairs, error, text in (
        ("ab", TypeError, "pairs must be a list"),
        (5, TypeError, "pairs must be a list"),
        (("a", "b"), TypeError, "pair 0 must be .context, continuation."),
        ([good, "ab"], TypeError, "pair 1 must be .context, continuation."),
        ([good, ("a", [5])], TypeError, "pair 1 must be .context, continuation."),
        ([good, ("a", "b", "c")], TypeError, "pair 1 must be .context, continuation."),
        ([good, ([5], ["a"])], TypeError, "pair 1 must be a string or a list of token ids"),
        ([good, ([5], [-1])], ValueError, "pair 1 has the token id -1"),
        ([good, ([5], [])], ValueError, "pair 1 has nothing to score"),
        ([good, ("a", "")], ValueError, "pair 1 has nothing to score"),
        ([good, ("", "")], ValueError, "pair 1 is empty"),
        ([([5] * 60, [6] * 6)], ValueError, "pair 0 has 66 tokens; max_model_len=64 allows 65"),
        (
            [("word " * 999, "a")],
            ValueError,
            "pair 0 has 4996 characters, too many for the 65 tokens that max_model_len=64 allows",
        ),
    ):
        with pytest.raises(error, match=text):
            llm.loglikelihood(pairs)
    for texts, error, text in (
        (["a", ""], ValueError, "text 1 is empty"),
        ([["a"]], TypeError, "text 0 must be a string"),
        ([[99999]], ValueError, "text 0 has the token id 99999"),
    ):
        with pytest.raises(error, match=text):
            llm.loglikelihood_rolling(texts)
    assert llm.llm_engine.metrics.steps == steps


def test_an_interrupt_leaves_nothing(llm, oracle, monkeypatch):
    submit, calls = llm.llm_engine.executor.submit, []

    def interrupt(step):
        calls.append(step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return submit(step)

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine.executor, "submit", interrupt)
        with pytest.raises(KeyboardInterrupt):
            llm.loglikelihood(PAIRS, use_tqdm=False)
    assert llm.is_finished()
    [found] = llm.loglikelihood(PAIRS[:1], use_tqdm=False)
    check(oracle, found, *split(llm, *PAIRS[0]))


def test_without_a_tokenizer_there_are_token_ids():
    with LLM(str(TINY), skip_tokenizer_init=True, max_model_len=64, **SMALL) as llm:
        [found] = llm.loglikelihood([([5], [6, 7])], use_tqdm=False)
        assert found.token_ids == [6, 7] and len(found.logprobs) == 2
        for call, value in (
            (llm.loglikelihood, [([], [6])]),
            (llm.loglikelihood_rolling, [[6]]),
        ):
            with pytest.raises(ValueError, match="give a context of one token or more"):
                call(value)
        with pytest.raises(ValueError, match="needs a tokenizer"):
            llm.loglikelihood([("a", "b")])
    with pytest.raises(RuntimeError, match="this LLM is closed"):
        llm.loglikelihood([([5], [6])])


@pytest.mark.gpu
def test_on_a_gpu(oracle):
    with LLM(str(TINY), dtype="float32", max_model_len=64) as llm:
        for _ in range(2):
            found = llm.loglikelihood(PAIRS, use_tqdm=False)
            for pair, one in zip(PAIRS, found, strict=True):
                check(oracle, one, *split(llm, *pair))
