"""Log-probabilities of prompts equal transformers' log_softmax of its logits, however the engine
gets there."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import TINY
from tiny_models import load_oracle, make_checkpoint, oracle_logits

from nanovllm import LLM, RequestOutputKind, SamplingParams
from nanovllm.core.step import Chunk, Scoring, StepInput
from nanovllm.ops.reference_sampling import top_logprobs
from nanovllm.worker.logprobs import LogprobsReader
from nanovllm.worker.record import make_records

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = [
    dict(prompt_logprobs=0, temperature=0),
    dict(prompt_logprobs=1, logprobs=2),
    dict(temperature=0, logprobs=1),
    dict(prompt_logprobs=20, repetition_penalty=1.5, logit_bias={7: 4.0}),  # of raw logits
    dict(),
    dict(prompt_logprobs=5, max_tokens=1),
    dict(prompt_logprobs=3),
]


@pytest.fixture(scope="module")
def setting():
    rng = random.Random(2)
    shared = [rng.randrange(128) for _ in range(20)]
    prompts = [shared + [rng.randrange(128) for _ in range(n)] for n in (0, 3, 20, 1, 2, 12)]
    return load_oracle(TINY), [*prompts, [5]]


def check(oracle, out, num_top):
    prompt, found = out.prompt_token_ids, out.prompt_logprobs
    expected = oracle_logits(oracle, prompt).log_softmax(-1)
    assert len(found) == len(prompt) and found[0] is None
    for token, line, row in zip(prompt[1:], found[1:], expected[:-1], strict=True):
        top_values, top = row.topk(num_top)
        assert list(line) == list(dict.fromkeys([token, *top.tolist()]))
        for rank, (other, value) in enumerate(zip(top.tolist(), top_values, strict=True), 1):
            assert line[other].rank == rank
            assert line[other].logprob == pytest.approx(float(value), abs=1e-4)
        assert line[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert line[token].rank == int((row >= row[token]).sum())


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_num_batched_tokens=5, max_num_seqs=3),
        dict(block_size=4, max_model_len=64, num_gpu_blocks_override=18, preempts=True),
    ],
    ids=["mixed", "chunks", "preemption"],
)
def test_they_equal_transformers(setting, options, depth, request, monkeypatch):
    oracle, prompts = setting
    defaults = {"ignore_eos": True, "seed": 1, "max_tokens": 12}
    params = [SamplingParams(**defaults | values) for values in ASKED]
    options = dict(options)
    if preempts := options.pop("preempts", False):
        request.getfixturevalue("crowded")
    else:
        options["kv_cache_memory_bytes"] = 4 << 20
    monkeypatch.setattr("nanovllm.worker.logprobs.NORMALIZED_LOGITS", 7 * 4096)
    with LLM(str(TINY), dtype="float32", async_scheduling=depth == 2, **options) as llm:
        plain = [replace(p, prompt_logprobs=None) for p in params]
        expected = llm.generate(prompts, plain, use_tqdm=False)
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for values, out, want in zip(ASKED, outputs, expected, strict=True):
                assert out.outputs[0].token_ids == want.outputs[0].token_ids
                if "prompt_logprobs" in values:
                    check(oracle, out, values["prompt_logprobs"])
                    assert out.num_cached_tokens == 0, "as in vLLM"
                else:
                    assert out.prompt_logprobs is None
        assert (llm.llm_engine.metrics.preemptions > 0) == preempts


def test_they_are_read_like_a_list(llm):
    [out] = llm.generate("In the beginning", SamplingParams(prompt_logprobs=2), use_tqdm=False)
    found, decode = out.prompt_logprobs, llm.get_tokenizer().decode
    assert found[1:] == [found[i] for i in range(1, len(found))] == list(found)[1:]
    assert found[-1] == found[len(found) - 1] and found[-len(found)] is None
    assert repr(found).startswith("[None, {")
    with pytest.raises(IndexError):
        found[len(found)]
    for line in found[1:]:
        assert all(entry.decoded_token == decode([token]) for token, entry in line.items())


def test_increments_bring_them_once(llm):
    def run(kind):
        params = SamplingParams(prompt_logprobs=1, max_tokens=4, temperature=0, output_kind=kind)
        llm.add_request("In the beginning", params)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        return [out.prompt_logprobs for out in outputs]

    whole, *others = run(RequestOutputKind.CUMULATIVE)
    assert len(others) == 3 and all(list(found) == list(whole) for found in others)
    first, *rest = run(RequestOutputKind.DELTA)
    assert list(first) == list(whole) and rest == [[], [], []]
    [final] = run(RequestOutputKind.FINAL_ONLY)
    assert list(final) == list(whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_step_and_half_precision(dtype, monkeypatch):
    monkeypatch.setattr("nanovllm.worker.logprobs.NORMALIZED_LOGITS", 3 * 50)
    torch.manual_seed(0)
    hidden, head = torch.randn(12, 8).to(dtype), torch.randn(50, 8).to(dtype)
    reader = LogprobsReader(4, 50)
    [record, *_], _ = make_records(4, 1, 12, torch.device("cpu"))
    # Two decodes, then chunks of 5, 1 and 4 tokens.
    chunks = [Chunk(row, 0, [1] * n, samples=True) for row, n in enumerate((5, 1, 4))]
    step = StepInput(decode_rows=np.arange(2, 4), decode_positions=np.zeros(2, np.int64))
    step.chunks, step.scorings = chunks, [Scoring(0, 1, [4, 9, 7], 3), Scoring(2, 0, [8] * 4, 0)]
    found = reader.score(step, hidden, lambda part: part @ head.T, record)
    queries, tokens = [3, 4, 5, 8, 9, 10, 11], torch.tensor([4, 9, 7, 8, 8, 8, 8])
    expected = top_logprobs((hidden[queries] @ head.T).float(), tokens, 3)
    for one, other in zip((found.token_ids, found.logprobs, found.ranks), expected, strict=True):
        np.testing.assert_allclose(one, other.numpy(), atol=1e-2 if dtype.itemsize == 2 else 1e-6)


def test_small_vocabularies_have_fewer(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", vocab_size=7)
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=16) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=10)
        [out] = llm.generate([1, 2, 3], params, use_tqdm=False)
    for line in out.prompt_logprobs[1:]:
        assert sorted(line) == list(range(7))
        assert sum(math.exp(entry.logprob) for entry in line.values()) == pytest.approx(1)
        assert line[next(iter(line))].decoded_token is None


@pytest.mark.parametrize("value", [-1, 21])
def test_how_many_is_limited(value):
    with pytest.raises(ValueError, match=r"prompt_logprobs must be in \[0, 20\], or None for"):
        SamplingParams(prompt_logprobs=value)
    assert SamplingParams(prompt_logprobs=True).prompt_logprobs == 1


@pytest.mark.gpu
def test_on_a_gpu(setting):
    oracle, prompts = setting
    params = [SamplingParams(**{"seed": 1, "max_tokens": 12} | values) for values in ASKED]
    for eager in (False, True):
        with LLM(str(TINY), dtype="float32", max_model_len=256, enforce_eager=eager) as llm:
            for _ in range(2):
                outputs = llm.generate(prompts, params, use_tqdm=False)
                for values, out in zip(ASKED, outputs, strict=True):
                    if "prompt_logprobs" in values:
                        check(oracle, out, values["prompt_logprobs"])
