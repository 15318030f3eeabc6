"""Log-probabilities equal transformers' log_softmax of its logits, however the engine gets
there."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import TINY
from fake_worker import logprob_lines
from tiny_models import load_oracle, make_checkpoint, oracle_logits

from nanovllm import LLM, Logprob, SamplingParams
from nanovllm.ops.reference_sampling import top_logprobs
from nanovllm.outputs import SampleLogprobs
from nanovllm.worker.logprobs import LogprobsReader
from nanovllm.worker.record import make_records

pytestmark = pytest.mark.usefixtures("one_thread")

ASKED = [
    dict(logprobs=0),
    dict(logprobs=1, temperature=0),
    dict(logprobs=5, repetition_penalty=1.5, logit_bias={7: 4.0}, temperature=0),  # of raw logits
    dict(logprobs=20, top_p=0.9, temperature=2.0, min_tokens=3),
    dict(),
    dict(logprobs=3, allowed_token_ids=[1, 2]),
]


@pytest.fixture(scope="module")
def setting():
    rng = random.Random(2)
    shared = [rng.randrange(128) for _ in range(20)]
    prompts = [shared + [rng.randrange(128) for _ in range(n)] for n in (0, 3, 20, 1, 2, 0)]
    return load_oracle(TINY), prompts


def check(oracle, prompt, completion, num_top):
    tokens, found = completion.token_ids, completion.logprobs
    expected = oracle_logits(oracle, prompt + tokens[:-1])[len(prompt) - 1 :].log_softmax(-1)
    assert len(found) == len(tokens)
    for token, line, row in zip(tokens, found, expected, strict=True):
        assert next(iter(line)) == token
        top_values, top = row.topk(num_top)
        assert list(line) == list(dict.fromkeys([token, *top.tolist()]))
        for rank, (other, value) in enumerate(zip(top.tolist(), top_values, strict=True), 1):
            assert line[other].rank == rank
            assert line[other].logprob == pytest.approx(float(value), abs=1e-4)
        assert line[token].logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert line[token].rank == int((row >= row[token]).sum())
    total = sum(float(row[token]) for token, row in zip(tokens, expected, strict=True))
    assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_num_batched_tokens=5, max_num_seqs=3),
        dict(block_size=4, max_model_len=64, num_gpu_blocks_override=20, preempts=True),
    ],
    ids=["mixed", "chunks", "preemption"],
)
def test_they_equal_transformers(setting, options, depth, request):
    oracle, prompts = setting
    params = [SamplingParams(**{"ignore_eos": True, "seed": 1} | values) for values in ASKED]
    options = dict(options)
    if preempts := options.pop("preempts", False):
        request.getfixturevalue("crowded")
    else:
        options["kv_cache_memory_bytes"] = 4 << 20
    with LLM(str(TINY), dtype="float32", async_scheduling=depth == 2, **options) as llm:
        for _ in range(2):
            outputs = llm.generate(prompts, params, use_tqdm=False)
            for prompt, values, out in zip(prompts, ASKED, outputs, strict=True):
                if "logprobs" in values:
                    check(oracle, prompt, out.outputs[0], values["logprobs"])
                else:
                    assert out.outputs[0].logprobs is out.outputs[0].cumulative_logprob is None
        assert (llm.llm_engine.metrics.preemptions > 0) == preempts


def test_those_read_while_it_runs_do_not_grow(llm):
    llm.add_request("In the", SamplingParams(temperature=0, max_tokens=5, logprobs=2))
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert [len(out.outputs[0].logprobs) for out in outputs] == [1, 2, 3, 4, 5]
    last = outputs[-1].outputs[0]
    assert list(outputs[2].outputs[0].logprobs) == last.logprobs[:3]
    assert last.logprobs[-1] == last.logprobs[4] and last.logprobs[1:4:2] == [
        last.logprobs[1],
        last.logprobs[3],
    ]
    with pytest.raises(IndexError):
        last.logprobs[5]
    decode = llm.get_tokenizer().decode
    for line in last.logprobs:
        assert all(entry.decoded_token == decode([token]) for token, entry in line.items())
    assert "Logprob(logprob=" in repr(last)


def test_ranks_count_all_that_are_as_likely():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0], [-torch.inf, 5.0, 0.0, 0.0, 0.0]])
    ids, logprobs, ranks = top_logprobs(logits, torch.tensor([2, 3]), 2)
    assert ranks.tolist() == [3, 4] and ids[:, 0].tolist() == [2, 3] and ids[1, 1] == 1
    torch.testing.assert_close(logprobs[0], torch.full((3,), math.log(logits[0].softmax(0)[1])))


def test_a_token_among_the_most_likely_takes_their_rank():
    found = SampleLogprobs(2)
    lines = [(2, [5, 4, 5, 9], [-1, -1, -1, -2]), (7, [8, 4, 5, 9], [-3, -1, -1.5, -2])]
    found.extend(logprob_lines(lines))
    assert found[0] == {5: Logprob(-1, 2), 4: Logprob(-1, 1)}
    assert found[1] == {8: Logprob(-3, 7), 4: Logprob(-1, 1), 5: Logprob(-1.5, 2)}
    assert found.cumulative == -4
    assert len(found) == 2 and found.lines.ranks.tolist() == [2, 7]
    assert found.lines.token_ids.tolist() == [[5, 4, 5], [8, 4, 5]]
    assert found.lines.logprobs.tolist() == [[-1, -1, -1], [-3, -1, -1.5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_batch_and_half_precision(dtype, monkeypatch):
    monkeypatch.setattr("nanovllm.worker.logprobs.NORMALIZED_LOGITS", 3 * 50)
    torch.manual_seed(0)
    logits, tokens = torch.randn(9, 50).to(dtype), torch.arange(9)
    [record, *_], _ = make_records(12, 1, 12, torch.device("cpu"))
    asking = [0, 2, 3, 5, 6, 7, 8]
    found = LogprobsReader(12, 50).read(logits, tokens, np.array(asking), record)
    expected = top_logprobs(logits[asking].float(), tokens[asking], 20)
    for one, other in zip((found.token_ids, found.logprobs, found.ranks), expected, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


def test_small_vocabularies_have_fewer(tmp_path):
    folder = make_checkpoint(tmp_path, "llama", vocab_size=7)
    with LLM(str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=16) as llm:
        params = SamplingParams(temperature=0, max_tokens=2, logprobs=10)
        [out] = llm.generate([1, 2], params, use_tqdm=False)
    for line in out.outputs[0].logprobs:
        assert sorted(line) == list(range(7))
        assert sum(math.exp(entry.logprob) for entry in line.values()) == pytest.approx(1)
        assert line[next(iter(line))].decoded_token is None


@pytest.mark.parametrize("value", [-1, 21, 2**70])
def test_how_many_is_limited(value):
    with pytest.raises(ValueError, match=r"logprobs must be in \[0, 20\], or None for none"):
        SamplingParams(logprobs=value)


def test_what_is_no_number_is_refused():
    assert SamplingParams(logprobs=True).logprobs == 1  # as in vLLM
    for value in ("5", 1.5, False):
        with pytest.raises(TypeError, match="logprobs must be a whole number"):
            SamplingParams(logprobs=value)
