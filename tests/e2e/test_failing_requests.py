"""Every way in which a request can fail while it runs: it ends with a reason, and the requests
beside it have the tokens that they have alone."""

import asyncio
import logging

import pytest
import torch
from conftest import TINY

from nanovllm import LLM, AsyncLLM, SamplingParams, StructuredOutputsParams

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_thread")

EOS, THE, OF, INF = 2, 263, 274, float("inf")  # " the", " of"
NOTHING = "no token is allowed next"


def raises(kind):
    def processor(output, logits):
        if len(output) == 2:
            raise kind("no way")
        return logits

    return processor


def recurses(output, logits):
    return recurses(output, logits)


def forbids_all(output, logits):
    return logits.fill_(-INF) if len(output) == 2 else logits


def one_nan(output, logits):
    return logits.index_fill(0, torch.tensor([7]), float("nan"))


def grammar(text):
    return dict(structured_outputs=StructuredOutputsParams(grammar=text))


FAILING = {
    "an error": (dict(logits_processors=[raises(ZeroDivisionError)]), 2, "ZeroDivisionError"),
    "an exit": (dict(logits_processors=[raises(SystemExit)]), 2, "SystemExit"),
    "a generator's end": (dict(logits_processors=[raises(StopIteration)]), 2, "StopIteration"),
    "recursion": (dict(logits_processors=[recurses]), 0, "RecursionError"),
    "no tensor": (dict(logits_processors=[lambda o, x: x.tolist()]), 0, "must return a tensor"),
    "another shape": (dict(logits_processors=[lambda o, x: x[1:]]), 0, "of shape"),
    "another dtype": (dict(logits_processors=[lambda o, x: x.half()]), 0, "float16"),
    "NaN": (dict(logits_processors=[lambda o, x: x * float("nan")]), 0, NOTHING),
    "one NaN": (dict(logits_processors=[one_nan]), 0, NOTHING),
    "-inf": (dict(logits_processors=[forbids_all]), 2, NOTHING),
    "-inf, drawn": (dict(logits_processors=[forbids_all], temperature=1.0, top_p=0.5), 2, NOTHING),
    "biases": (dict(allowed_token_ids=[THE, OF], logit_bias={THE: -INF, OF: -INF}), 0, NOTHING),
    "biases, drawn": (
        dict(allowed_token_ids=[THE], logit_bias={THE: -INF}, temperature=1.0, top_k=3), 0, NOTHING
    ),
    "bad words": (dict(allowed_token_ids=[THE], bad_words=["the"]), 0, NOTHING),
    "bad words, later": (dict(allowed_token_ids=[THE], bad_words=["the the the"]), 2, NOTHING),
    "min_tokens": (dict(allowed_token_ids=[EOS], min_tokens=3, temperature=1.0), 0, NOTHING),
    "stop tokens": (dict(allowed_token_ids=[9], stop_token_ids=[9], min_tokens=3), 0, NOTHING),
    "every token": (dict(logit_bias=dict.fromkeys(range(2560), -INF)), 0, NOTHING),
    "too large": (grammar('start: "a" b\nb: "x" b'), 1, "Too many items"),
}  # fmt: skip


def prefers_the(output, logits):
    return logits.index_fill(0, torch.tensor([THE]), 1e9)


@pytest.fixture(scope="module", params=[1, 2], ids=["depth 1", "depth 2"])
def engine(request):
    depth = request.param
    options = dict(dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2)
    with LLM(str(TINY), device="cpu", max_model_len=128, **options) as llm:
        yield llm


OTHERS = [
    dict(temperature=0),
    dict(temperature=0.9, seed=1, top_k=40),
    dict(temperature=0, repetition_penalty=1.3),
    dict(temperature=0, structured_outputs=StructuredOutputsParams(regex="[a-z]{3} [a-z]{4}")),
    dict(temperature=0, logits_processors=[prefers_the]),
    dict(temperature=0, stop=["God"]),
]


@pytest.fixture(scope="module")
def others(engine):
    params = [SamplingParams(max_tokens=10, **values) for values in OTHERS]
    return params, [
        engine.generate("In the beginning", p, use_tqdm=False)[0].outputs[0].token_ids
        for p in params
    ]


@pytest.mark.parametrize("name", FAILING)
def test_a_request_that_fails_ends_alone(engine, others, name):
    values, num_tokens, reason = FAILING[name]
    failing = SamplingParams(**{"temperature": 0, "max_tokens": 10, **values})
    params, alone = others
    mixed = [*params[:3], failing, *params[3:], failing]
    outputs = engine.generate(["In the beginning"] * len(mixed), mixed, use_tqdm=False)
    found = [output.outputs[0] for output in outputs]
    bad = found.pop(3), found.pop()
    assert [completion.token_ids for completion in found] == alone
    for completion in bad:
        assert completion.finish_reason == "error" and reason in completion.error
        assert len(completion.token_ids) == num_tokens
        allowed = values.get("allowed_token_ids")
        assert allowed is None or set(completion.token_ids) <= set(allowed)


@pytest.mark.parametrize("stop", [[], ["zzz"]], ids=["text", "stop strings"])
def test_text_that_the_tokenizer_cannot_decode(engine, others, stop, monkeypatch):
    decode = engine.get_tokenizer().decode

    def fails(token_ids, **options):
        if 1234 in token_ids:
            raise LookupError("no such piece")
        return decode(token_ids, **options)

    monkeypatch.setattr(engine._requests.detokenizer.tokenizer, "decode", fails)
    params, alone = others
    failing = SamplingParams(temperature=0, max_tokens=4, logit_bias={1234: 1e9}, stop=stop)
    outputs = engine.generate(["In the beginning"] * 7, [failing, *params], use_tqdm=False)
    bad, *found = [output.outputs[0] for output in outputs]
    assert [completion.token_ids for completion in found] == alone
    assert bad.finish_reason == "error" and "LookupError('no such piece')" in bad.error


@pytest.mark.parametrize("way", ["stream", "step", "async"])
def test_text_that_fails_while_others_are_read(engine, others, way, monkeypatch):
    decode = engine.get_tokenizer().decode

    def fails(token_ids, **options):
        if 1234 in token_ids:
            raise LookupError("no such piece")
        return decode(token_ids, **options)

    [good, *_], [alone, *_] = others
    failing = SamplingParams(temperature=0, max_tokens=4, logit_bias={1234: 1e9})
    last, num_tokens = {}, [0, 0]

    def note(index, output):
        last[index] = output.outputs[0]
        num_tokens[index] += len(last[index].token_ids)

    if way == "async":
        llm = AsyncLLM(str(TINY), max_model_len=64)
        monkeypatch.setattr(llm._llm._requests.detokenizer.tokenizer, "decode", fails)

        async def run(index, params):
            async for output in llm.generate("In the beginning", params):
                note(index, output)

        async def run_all():
            await asyncio.gather(run(0, failing), run(1, good))

        asyncio.run(run_all())
        llm.shutdown()
    else:
        monkeypatch.setattr(engine._requests.detokenizer.tokenizer, "decode", fails)
        if way == "stream":
            for output in engine.stream(["In the beginning"] * 2, [failing, good]):
                note(output.index, output)
        else:
            ids = [engine.add_request("In the beginning", p) for p in (failing, good)]
            while not engine.is_finished():
                for output in engine.step():
                    note(ids.index(output.request_id), output)
    assert last[0].finish_reason == "error" and "LookupError" in last[0].error
    if way == "stream":
        assert num_tokens == [4, len(alone)]
    else:
        assert last[1].token_ids == alone


def test_an_error_that_cannot_be_shown(engine, others):
    class MuteError(Exception):
        def __repr__(self):
            raise TypeError("no words")

        __str__ = __repr__

    def fails(output, logits):
        raise MuteError

    params, alone = others
    failing = SamplingParams(logits_processors=[fails])
    outputs = engine.generate(["In the beginning"] * 7, [failing, *params], use_tqdm=False)
    bad, *found = [output.outputs[0] for output in outputs]
    assert [completion.token_ids for completion in found] == alone
    assert bad.finish_reason == "error" and bad.error.endswith("MuteError")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('start: "a" X\nX: /b/ & /c/', "a"),
        (r'start: "ab" /[^\s\S]/', "ab"),
        ('start: "ab" X "c"\nX: /b+/ & ~/b.*/', "ab"),
    ],
)
def test_a_grammar_with_no_way_on_ends_its_request(engine, others, caplog, text, expected):
    params, alone = others
    failing = SamplingParams(temperature=0, max_tokens=10, **grammar(text))
    with caplog.at_level(logging.WARNING):
        outputs = engine.generate(["In the beginning"] * 7, [failing, *params], use_tqdm=False)
    ended, *found = [output.outputs[0] for output in outputs]
    assert (ended.text, ended.finish_reason, ended.error) == (expected, "stop", None)
    assert ended.token_ids[-1] in (EOS, 0)
    assert [completion.token_ids for completion in found] == alone
    assert [r.getMessage() for r in caplog.records if "no way on" in r.getMessage()] == [
        f"a grammar has no way on after {len(ended.token_ids) - 1} tokens: its request ends there"
    ]


def test_options_that_leave_a_token_still_run(engine):
    params = SamplingParams(
        temperature=0, max_tokens=5, allowed_token_ids=[THE, OF, EOS], bad_words=["the"],
        logit_bias={EOS: -INF},
    )  # fmt: skip
    [output] = engine.generate("In", params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == [OF] * 5


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["biases", "bad words", "-inf, drawn", "NaN"])
def test_a_gpu_ends_them_too(name):
    values, num_tokens, reason = FAILING[name]
    failing = SamplingParams(**{"temperature": 0, "max_tokens": 10, **values})
    plain = SamplingParams(temperature=0, max_tokens=10)
    options = dict(device="cuda", dtype="float32", kv_cache_memory_bytes=64 << 20)
    with LLM(str(TINY), max_model_len=128, **options) as llm:
        [alone] = llm.generate("In the", plain, use_tqdm=False)
        outputs = llm.generate(["In the"] * 3, [plain, failing, plain], use_tqdm=False)
    first, bad, last = [output.outputs[0] for output in outputs]
    assert first.token_ids == last.token_ids == alone.outputs[0].token_ids
    assert bad.finish_reason == "error" and reason in bad.error
    assert len(bad.token_ids) == num_tokens
