"""What vLLM's CPU build said of the model in the box in float32 (tools/record_vllm.py) is what we
say: tokens, texts, why they ended, log-probabilities."""

import json
from dataclasses import fields
from pathlib import Path

import pytest

from nanovllm import LLM, SamplingParams

RECORDED = json.loads(
    (Path(__file__).parents[1] / "data" / "vllm_cpu_greedy.json").read_text(encoding="utf-8")
)
# Two float32 forwards that add in different orders: logits of size 20 differ by some 1e-5.
TOLERANCE = 2e-4
HAVE = {field.name for field in fields(SamplingParams)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(llm):
    return answer_all(llm)


def answer_all(llm):
    """Of each request vLLM's answer and ours, all from one batch."""
    answers = RECORDED["answers"]
    params = [
        SamplingParams.from_optional(
            temperature=0, **{k: v for k, v in a["params"].items() if k in HAVE}
        )
        for a in answers
    ]
    outputs = llm.generate([a["prompt"] for a in answers], params, use_tqdm=False)
    return list(zip(answers, outputs, strict=True))


def test_tokens_texts_and_ends_are_vllms(pairs):
    assert len(pairs) >= 30
    for answer, output in pairs:
        ours = output.outputs[0]
        said = (ours.token_ids, ours.text, ours.finish_reason, ours.stop_reason)
        names = ("token_ids", "text", "finish_reason", "stop_reason")
        assert said == tuple(answer[name] for name in names), answer["params"]
        assert output.prompt_token_ids == answer["prompt_token_ids"]


def test_logprobs_are_vllms(pairs):
    compared = 0
    for answer, output in pairs:
        if "logprobs" not in answer:
            continue
        ours = output.outputs[0]
        assert ours.cumulative_logprob == pytest.approx(answer["cumulative_logprob"], abs=5e-3)
        for line, theirs in zip(ours.logprobs, answer["logprobs"], strict=True):
            assert line.keys() == {token_id for token_id, *_ in theirs}
            for token_id, logprob, rank, text in theirs:
                assert line[token_id].logprob == pytest.approx(logprob, abs=TOLERANCE)
                assert (line[token_id].rank, line[token_id].decoded_token) == (rank, text)
                compared += 1
    assert compared > 1000


@pytest.mark.skipif("prompt_logprobs" not in HAVE, reason="SamplingParams has no prompt_logprobs")
def test_prompt_logprobs_are_vllms(pairs):
    for answer, output in pairs:
        if "prompt_logprobs" in answer:
            assert output.prompt_logprobs[0] is None
            known = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            ours = [entry[token] for token, entry in known if entry is not None]
            for entry, (logprob, rank) in zip(ours, answer["prompt_logprobs"], strict=True):
                assert entry.logprob == pytest.approx(logprob, abs=TOLERANCE)
                assert entry.rank == rank


@pytest.mark.gpu
def test_a_gpu_says_the_same(tiny):
    with LLM(str(tiny), dtype="float32", device="cuda", kv_cache_memory_bytes=64 << 20) as llm:
        pairs = answer_all(llm)
    test_tokens_texts_and_ends_are_vllms(pairs)
    test_logprobs_are_vllms(pairs)
