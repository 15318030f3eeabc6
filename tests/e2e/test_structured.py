"""Structured outputs and Python logits processors: what the host does between logits and draw. The
texts are valid, the tokens the same however the engine gets there, and others' are untouched."""

import json
import random
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import TINY
from tiny_models import load_oracle, make_checkpoint, oracle_logits
from transformers import NoBadWordsLogitsProcessor, RepetitionPenaltyLogitsProcessor

from nanovllm import LLM, RequestOutputKind, SamplingParams, StructuredOutputsParams
from nanovllm.core.step import RowStart
from nanovllm.frontend.structured_outputs import _closed
from nanovllm.worker.host_processors import HostProcessors
from nanovllm.worker.record import make_records
from nanovllm.worker.rows import Rows

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_thread")

EOS, END_OF_TEXT = 2, 0  # both end a request of the model in the box
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["God", "bread"]}, "maxItems": 2},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}


def is_person(text):
    found = json.loads(text)
    return (
        list(found) == ["name", "age", "likes"]
        and isinstance(found["name"], str)
        and len(found["name"]) <= 6
        and type(found["age"]) is int
        and 0 <= found["age"] <= 150
        and set(found["likes"]) <= {"God", "bread"}
        and len(found["likes"]) <= 2
    )


def matches(pattern):
    return lambda text: re.fullmatch(pattern, text) is not None


WORDS = r"[a-z]{3,9}(, [a-z/é]+){1,2}\."
SUM = 'root ::= term ("+" term)* "="\nterm ::= [0-9] | "(" term ")"'
TAG = {
    "structures": [{"begin": "<a=", "schema": {"type": "integer"}, "end": ">"}],
    "triggers": ["<a"],
}
KINDS = {
    "json": (dict(json=PERSON, disable_any_whitespace=True), is_person),
    "json text": (dict(json=json.dumps(PERSON), whitespace_pattern=" ?"), is_person),
    "regex": (dict(regex=rf"^{WORDS}$"), matches(WORDS)),
    "choice": (dict(choice=["the king", "the kingdom", 'a "word"\n', "é😀"]), lambda text: True),
    "gbnf": (dict(grammar=SUM), matches(r"[0-9()]+(\+[0-9()]+)*=")),
    "lark": (dict(grammar='start: "x" NUMBER\nNUMBER: /[0-9]{1,3}/'), matches(r"x[0-9]{1,3}")),
    "json_object": (dict(json_object=True), lambda text: isinstance(json.loads(text), dict)),
    "structural_tag": (
        dict(structural_tag=json.dumps(TAG)),
        lambda text: len(re.findall("<a", text)) == len(re.findall(r"<a=-?\d+>", text)),
    ),
}  # fmt: skip


def ask(structured=None, max_tokens=40, temperature=0.0, **values):
    if structured is not None:
        values["structured_outputs"] = StructuredOutputsParams(**structured)
    return SamplingParams(max_tokens=max_tokens, temperature=temperature, **values)


def generate(llm, prompts, params):
    return [out.outputs[0] for out in llm.generate(prompts, params, use_tqdm=False)]


def token_ids(completions):
    return [completion.token_ids for completion in completions]


def repeats_less(prompt, output, logits):
    """transformers' own, as a processor of three arguments."""
    processor = RepetitionPenaltyLogitsProcessor(1.5)
    tokens = torch.tensor([prompt + output], device=logits.device)
    return processor(tokens, logits[None])[0]


@pytest.fixture(scope="module")
def setting(llm):
    """Prompts, parameters and what each gives alone: structured ones, greedy and random, of which
    several share a grammar; Python processors; and plain ones."""
    params = []
    for structured, _ in KINDS.values():
        params += [ask(structured), ask(structured, temperature=1.0, seed=3)]
    params.append(ask(KINDS["json"][0], seed=4, temperature=0.8, top_p=0.9, repetition_penalty=1.2))
    params.append(ask(logits_processors=[repeats_less], max_tokens=12))
    params += [ask(ignore_eos=True), ask(temperature=1.0, seed=1), ask(min_tokens=9, seed=2)] * 2
    rng = random.Random(1)
    shared = llm.get_tokenizer()("In the beginning God created the heaven and")["input_ids"]
    prompts = [shared + [rng.randrange(300, 400) for _ in range(i % 4)] for i in range(len(params))]
    alone = [generate(llm, prompt, p)[0] for prompt, p in zip(prompts, params, strict=True)]
    return prompts, params, alone


def test_texts_that_end_are_valid(setting):
    _, params, alone = setting
    checks = [check for _, check in KINDS.values() for _ in range(2)]
    num_ended = 0
    for p, completion, check in zip(params, alone, checks, strict=False):
        choices = p.structured_outputs.choice
        assert completion.finish_reason in ("stop", "length")
        if completion.finish_reason == "stop":
            num_ended += 1
            assert check(completion.text), completion.text
            assert choices is None or completion.text in choices
            assert completion.token_ids[-1] in (EOS, END_OF_TEXT)
    assert num_ended >= 9


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(max_num_batched_tokens=7, max_num_seqs=5),
        dict(block_size=4, max_num_seqs=12, num_gpu_blocks_override=40, preempts=True),
    ],
    ids=["mixed", "chunks", "preemption"],
)
def test_tokens_are_the_same_in_any_batch(setting, options, depth, request):
    prompts, params, alone = setting
    options = {"max_model_len": 96, **options}
    if preempts := options.pop("preempts", False):
        request.getfixturevalue("crowded")
    else:
        options["kv_cache_memory_bytes"] = 4 << 20
    with LLM(str(TINY), dtype="float32", async_scheduling=depth == 2, **options) as llm:
        for order in (range(len(prompts)), range(len(prompts))[::-1]):  # cold, then warm
            batch = [prompts[i] for i in order], [params[i] for i in order]
            assert token_ids(generate(llm, *batch)) == [alone[i].token_ids for i in order]
        assert (llm.llm_engine.metrics.preemptions > 0) == preempts


def test_parts_of_a_batch(setting, llm, monkeypatch):
    monkeypatch.setattr("nanovllm.worker.sampler.PROCESSED_LOGITS", 3 * 2560)
    prompts, params, alone = setting
    assert token_ids(generate(llm, prompts, params)) == token_ids(alone)


def test_choices_equal_transformers(llm):
    """A greedy token is the most likely token among the tokens that lead to a choice."""
    choices = ["the king of Judah", "the kingdom", "then", "the", "a man", "thee"]
    oracle, tokenizer = load_oracle(TINY), llm.get_tokenizer()
    pieces = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    for prompt in ("In the beginning", "The king said unto", "And it came to pass that he saw"):
        ids, output, text = tokenizer(prompt)["input_ids"], [], ""
        while not output or output[-1] > EOS:
            allowed = [
                i
                for i, piece in enumerate(pieces)
                if i > EOS and any(choice.startswith(text + piece) for choice in choices)
            ]
            if text in choices:
                allowed += [EOS, END_OF_TEXT]
            logits = oracle_logits(oracle, ids + output)[-1]
            output.append(allowed[int(logits[allowed].argmax())])
            text += pieces[output[-1]]
        [completion] = generate(llm, prompt, ask(dict(choice=choices)))
        assert completion.token_ids == output


@pytest.mark.parametrize("vocab_size", [2600, 2500])
def test_vocabularies_of_another_size_than_the_tokenizers(tmp_path, vocab_size):
    """Random weights, whose likeliest tokens are no text at all."""
    folder = make_checkpoint(tmp_path, "llama", vocab_size=vocab_size, eos_token_id=EOS)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    kinds = [kind for kind in KINDS.values() if "choice" not in kind[0]]
    params = [ask(kind, 200, 0.5 * i, seed=i) for kind, _ in kinds for i in range(3)]
    with LLM(str(folder), dtype="float32", max_model_len=256) as llm:
        found = generate(llm, ["In the"] * len(params), params)
    for completion, (_, check) in zip(
        found, [kind for kind in kinds for _ in range(3)], strict=True
    ):
        assert max(completion.token_ids) < min(vocab_size, 2560)
        assert completion.finish_reason == "length" or check(completion.text)
    assert sum(completion.finish_reason == "stop" for completion in found) >= 6


def test_a_grammar_is_compiled_once(llm, monkeypatch):
    compiler, calls = llm._requests.grammars, []
    compile_one = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda p: calls.append(p) or compile_one(p))
    params = [ask(dict(regex="[a-m]{2}")), ask(dict(regex="[a-n]{2}"))] * 3
    generate(llm, ["a"] * 6, params)
    generate(llm, ["a"] * 3, params[0])
    assert len(calls) == 2
    monkeypatch.setattr("nanovllm.frontend.structured_outputs.NUM_KEPT", len(compiler.compiled))
    generate(llm, "a", ask(dict(regex="[a-o]{2}")))
    assert len(compiler.compiled) == len(calls) + len(compiler.compiled) - 3 and len(calls) == 3


# Together with other options


@pytest.mark.parametrize("depth", [1, 2])
def test_the_grammar_has_the_last_word(depth):
    def prefers_q(output, logits):
        logits[:] = 0
        logits[tokenizer.encode("q")] = 50
        return logits

    yes = dict(choice=["yes"])
    with LLM(
        str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2
    ) as llm:
        tokenizer = llm.get_tokenizer()
        forbids = {token: -float("inf") for token in tokenizer.encode("yes")}
        params = [
            ask(yes, min_tokens=9),
            ask(yes, bad_words=["yes", "y"]),
            ask(yes, logit_bias=forbids, temperature=0.3, seed=1),
            ask(yes, allowed_token_ids=tokenizer.encode("no"), temperature=1.7, seed=1),
            ask(yes, logits_processors=[prefers_q]),
            ask(dict(regex="[a-z]{5}"), logits_processors=[prefers_q]),
            ask(dict(regex="[a-z]{5}"), bad_words=["e", "the"], logit_bias={EOS: 99.0}),
        ]
        found = [c.text for c in generate(llm, ["And he said,"] * len(params), params)]
    assert found[:6] == ["yes"] * 5 + ["qqqqq"]
    assert re.fullmatch("[a-df-z]{5}", found[6])


def test_ways_to_end(llm):
    prompt, pattern = "And he said,", dict(regex="[a-z]{2,30}")
    [plain] = generate(llm, prompt, ask(pattern))
    [short] = generate(llm, prompt, ask(dict(regex="[a-z]{2}"), ignore_eos=True, max_tokens=8))
    assert len(short.text) == 2 and set(short.token_ids[-4:]) <= {EOS, END_OF_TEXT}
    assert (short.finish_reason, len(short.token_ids)) == ("length", 8)
    # A stop token may come wherever the grammar can end, and nowhere else because of being one.
    [point] = llm.get_tokenizer().encode(".")
    biased = dict(stop_token_ids=[point], logit_bias={point: 99.0})
    [stopped] = generate(llm, prompt, ask(pattern, **biased))
    assert stopped.stop_reason == point and len(stopped.text) >= 2
    assert plain.text.startswith(stopped.text)
    [until] = generate(llm, prompt, ask(pattern, stop=[plain.text[1:3]]))
    assert (until.text, until.stop_reason) == (plain.text[:1], plain.text[1:3])
    [cut] = generate(llm, prompt, ask(KINDS["json"][0], max_tokens=3))
    assert cut.finish_reason == "length"
    outputs = llm.generate(prompt, ask(pattern, logprobs=2), use_tqdm=False)[0].outputs[0]
    assert len(outputs.logprobs) == len(outputs.token_ids)  # of the model's own logits
    assert outputs.token_ids == plain.token_ids


def test_closed_schemas(llm):
    schema = {
        "properties": {"properties": {"type": "object", "properties": {}}, "a": {"$ref": "#/a"}},
        "$defs": {"a": {"patternProperties": {"x": True}, "additionalProperties": True}},
        "anyOf": [{"properties": {"b": {"const": {"properties": {}}}}}, True],
    }  # fmt: skip
    closed = _closed(schema)
    inner = closed["properties"]["properties"]
    assert inner == {"type": "object", "properties": {}, "additionalProperties": False}
    assert closed["additionalProperties"] is False and closed["$defs"] == schema["$defs"]
    assert closed["anyOf"][0]["additionalProperties"] is False and closed["anyOf"][1] is True
    assert closed["anyOf"][0]["properties"]["b"] == {"const": {"properties": {}}}
    kind = dict(json={"type": "object", "properties": {}}, disable_any_whitespace=True)
    open_one, closed_one = generate(
        llm, ["a", "a"], [ask(kind), ask(kind | {"disable_additional_properties": True})]
    )
    assert open_one.text.startswith('{"') and closed_one.text == "{}"


# Logits processors


def test_processors_equal_the_options(llm):
    """In their place among them: after penalties, before temperature."""
    tokenizer = llm.get_tokenizer()
    bad = [tokenizer.encode(word, add_special_tokens=False) for word in (" the", " of", ",")]

    def biased(output, logits):
        return logits.index_add(0, torch.tensor([364, 14]), torch.tensor([-9.0, 2.0]))

    def without(output, logits):
        padded = torch.tensor([[-5] * 5 + output])
        return NoBadWordsLogitsProcessor(bad)(padded, logits[None].clone())[0]

    class Bias:
        def __call__(self, *arguments):
            return biased(*arguments)

    common = dict(max_tokens=20, ignore_eos=True)
    pairs = [
        (dict(logit_bias={364: -9.0, 14: 2.0}), [biased]),
        (dict(logit_bias={364: -18.0, 14: 4.0}), [Bias(), biased]),
        (dict(bad_words=["the", "of", ","]), [without]),
        (dict(repetition_penalty=1.5), [repeats_less]),
        (dict(logit_bias={364: -9.0, 14: 2.0}, seed=5, temperature=0.7, top_k=9), [biased]),
    ]
    params = []
    for values, processors in pairs:
        draws = {k: values[k] for k in ("seed", "temperature", "top_k") if k in values}
        params.append(ask(**{**common, **values}))
        params.append(ask(**{**common, **draws}, logits_processors=processors))
    params.append(ask(repetition_penalty=1.5, logits_processors=[biased], **common))
    params.append(ask(logits_processors=[repeats_less, biased], **common))
    params.append(ask(**common))
    *found, plain = token_ids(generate(llm, ["And God said unto"] * len(params), params))
    assert found[::2] == found[1::2] and plain not in found


@pytest.mark.parametrize("depth", [1, 2])
def test_processors_see_every_token(depth):
    seen = []

    def watch(prompt, output, logits):
        assert logits.dtype == torch.float32 and logits.shape == (2560,)
        seen.append((prompt, output))
        output.append(-1)  # its own list
        return logits

    with LLM(
        str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2
    ) as llm:
        [out] = llm.generate("In the", ask(logits_processors=[watch], max_tokens=5), use_tqdm=False)
    ids, prompt = out["token_ids"], out.prompt_token_ids
    assert seen == [(prompt, [*ids[:n], -1]) for n in range(5)]


def test_tokens_are_read_when_the_device_has_written_them():
    rows = Rows(4, 1, 4, 100, torch.device("cpu"))
    records, _ = make_records(4, 1, 4, torch.device("cpu"))
    record, host = records[0], HostProcessors(rows)

    class Event:
        def synchronize(self):
            record.token_ids[:2] = [5, 7]
            waits.append(self)

    waits = []
    params = ask(logits_processors=[lambda output, logits: logits])
    starts = [RowStart(1, 0, ask(), 0, (), 0), RowStart(2, 0, params, 0, (), 0)]
    rows.start(starts, record)
    host.keep(np.array([1, 2]), np.array([0, 1]), record)
    assert record.errors == {}
    record.event = Event()
    host.catch_up(np.array([0, 1, 3]))
    assert not waits  # none of these rows needs the host
    host.catch_up(np.array([2, 1]))
    host.catch_up(np.array([2]))  # it has drawn nothing since
    assert rows.on_host[2].output == [7] and len(waits) == 1
    rows.start([RowStart(2, 0, ask(), 0, (), 0)], records[1])
    assert not rows.on_host and not rows.needs_host.any()


def test_what_a_processor_may_take():
    for good in (lambda *a: a[-1], lambda o, x, scale=1.0: x, lambda p, o, x: x, max):
        SamplingParams(logits_processors=[good])
    for bad in (lambda x: x, lambda p, o, x, y: x):
        with pytest.raises(TypeError, match="a logits processor takes"):
            SamplingParams(logits_processors=[bad])
    for bad in (repeats_less, [1], "x"):
        with pytest.raises(TypeError, match="logits_processors must be a list of callables"):
            SamplingParams(logits_processors=bad)


BREAKS = [
    (lambda o, x: 1 / (len(o) - 3) and x, "after 3 tokens: ZeroDivisionError"),
    (lambda o, x: None, r"after 0 tokens: .*logits_processors\[0\] must return a tensor, not None"),
    (lambda o, x: x[:7], r"must return torch.float32 of shape \(2560,\) on cpu, not .*\(7,\)"),
    (lambda o, x: x.double(), "not torch.float64"),
]


@pytest.mark.parametrize("depth", [1, 2])
def test_errors_end_one_request(depth):
    plain, structured = ask(max_tokens=9), ask(KINDS["json"][0])
    with LLM(
        str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2
    ) as llm:
        expected = token_ids(generate(llm, ["In the", "And he"], [plain, structured]))
        for breaks, message in BREAKS:
            llm.add_request("In the", plain, "a")
            llm.add_request("And he", structured, "b")
            bad = ask(ignore_eos=True, logits_processors=[breaks])
            _, completion = generate(llm, ["x", "y"], [ask(), bad])
            assert completion.finish_reason == "error"
            assert re.search(rf"request '\d+' ended by an error .*{message}", completion.error)
            last = {}
            while not llm.is_finished():
                last |= {out.request_id: out["token_ids"] for out in llm.step()}
            assert [last["a"], last["b"]] == expected
        assert llm.llm_engine.metrics.preemptions == 0

        # Driven by steps: others lose nothing, and the request is gone.
        delta = ask(max_tokens=9, output_kind=RequestOutputKind.DELTA)
        llm.add_request("In the", delta, "a")
        llm.add_request("y", ask(ignore_eos=True, logits_processors=[BREAKS[0][0]]), "bad")
        llm.add_request("In the", delta, "c")
        got = {"a": [], "bad": [], "c": []}
        while not llm.is_finished():
            for out in llm.step():
                got[out.request_id].append(out)
        for name in "a", "c":
            assert [token for out in got[name] for token in out["token_ids"]] == expected[0]
        *_, bad = got["bad"]
        assert bad.finished and "request 'bad'" in bad.error and "ZeroDivisionError" in bad.error
        bad = ask(ignore_eos=True, logits_processors=[BREAKS[0][0]])
        *_, out = llm.stream("y", bad)
        assert out.outputs[0].finish_reason == "error" and "ZeroDivisionError" in out.error
        while not llm.is_finished():  # a step was under way
            assert llm.step() == []


@pytest.mark.parametrize("depth", [1, 2])
def test_what_runs_past_an_end_breaks_nothing(depth):
    """At depth 2 a step more is under way when the end is seen."""

    def picky(output, logits):
        assert EOS not in output and len(output) <= 4
        logits[:] = 0
        logits[EOS if len(output) == 4 else 300] = 9
        return logits

    with LLM(
        str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2
    ) as llm:
        for _ in range(2):
            [completion] = generate(llm, "a", ask(logits_processors=[picky]))
            assert completion.token_ids == [300] * 4 + [EOS]
            [stopped] = generate(llm, "a", ask(KINDS["regex"][0], stop_token_ids=[*range(3, 2560)]))
            assert len(stopped.token_ids) == 1


@pytest.mark.parametrize("depth", [1, 2])
def test_an_interrupted_step_starts_over(depth):
    interrupts = iter([False] * 4 + [True] + [False] * 100)

    def interrupted(output, logits):
        if next(interrupts):
            raise KeyboardInterrupt
        return logits

    structured = ask(KINDS["json"][0], seed=1, temperature=0.9)
    with LLM(
        str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20, async_scheduling=depth == 2
    ) as llm:
        expected = token_ids(generate(llm, ["And he", "x"], [structured, ask()]))
        llm.add_request("And he", structured, "a")
        llm.add_request("x", ask(logits_processors=[interrupted]), "b")
        last = {}
        with pytest.raises(KeyboardInterrupt):
            while True:
                last |= {out.request_id: out["token_ids"] for out in llm.step()}
        while not llm.is_finished():
            last |= {out.request_id: out["token_ids"] for out in llm.step()}
        assert [last["a"], last["b"]] == expected


# Bad input


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        (dict(), ValueError, "exactly one of json, regex, .*; got none"),
        (dict(regex="a", choice=["a"]), ValueError, "got regex and choice"),
        (dict(regex=""), ValueError, "regex is '', which says nothing"),
        (dict(choice=[]), ValueError, r"choice is \[\], which says nothing"),
        (dict(json_object=False), ValueError, "json_object is False, which says nothing"),
        (dict(choice="yes"), TypeError, "choice can't be 'yes'"),
        (dict(choice=["a", 1]), TypeError, "choice must be strings"),
        (dict(json=[1]), TypeError, r"json can't be \[1\]"),
        (dict(regex="a", disable_any_whitespace=1), TypeError, "disable_any_whitespace can't"),
        (dict(json={}, whitespace_pattern=b" "), TypeError, "whitespace_pattern can't be"),
    ],
)
def test_bad_params_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        StructuredOutputsParams(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(regex="a("), "regex won't do: .*unclosed group"),
        (dict(regex="(?=a)b"), "regex won't do: .*look-around"),
        (dict(regex="a\0"), "regex won't do: it has a NUL character"),
        (dict(json="{"), "json won't do: "),
        (dict(json="[1]"), "json won't do: .*object schema"),
        (dict(json={"type": "strin"}), "json won't do: Invalid type: strin"),
        (dict(json={"type": "array", "uniqueItems": True}), "json won't do: Unimplemented"),
        (dict(json={"not": object}), "json won't do: .*not JSON serializable"),
        (dict(grammar="start: foo"), "grammar won't do: .*unknown name"),
        (dict(grammar="  "), "grammar won't do: "),
        (dict(grammar='root ::= "a" foo'), "grammar won't do: .*'foo' not found"),
        (dict(structural_tag="{}"), "structural_tag won't do: .*'structures'"),
        (dict(structural_tag="[1]"), "structural_tag won't do: "),
        (dict(structural_tag='{"structures":[{"begin":"x"}],"triggers":["y"]}'), "no trigger"),
        (dict(structural_tag='{"structures": [{}], "triggers": []}'), "KeyError"),
        (dict(structural_tag='{"structures": [], "triggers": []}'), "must not be empty"),
    ],
)  # fmt: skip
def test_bad_grammars_are_refused_and_nothing_runs(llm, values, message):
    with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
        llm.generate(["a", "b"], [ask(), ask(values)], use_tqdm=False)
    assert llm.is_finished()


def test_params_changed_afterwards(llm):
    structured = StructuredOutputsParams(regex="a")
    structured.regex = None
    with pytest.raises(ValueError, match="got none"):
        SamplingParams(structured_outputs=structured)
    with pytest.raises(TypeError, match="structured_outputs must be StructuredOutputsParams"):
        SamplingParams(structured_outputs={"regex": "a"})


def test_without_the_package(monkeypatch):
    with LLM(str(TINY), dtype="float32", kv_cache_memory_bytes=4 << 20) as llm:
        monkeypatch.setitem(sys.modules, "llguidance", None)
        with pytest.raises(ValueError, match=r"pip install 'nanovllm\[structured\]'"):
            llm.generate("a", ask(dict(regex="a")))


def test_without_tokenizer_or_eos(tmp_path, copy_tiny):
    options = dict(dtype="float32", kv_cache_memory_bytes=4 << 20)
    with (
        LLM(str(TINY), skip_tokenizer_init=True, **options) as llm,
        pytest.raises(ValueError, match="structured_outputs need a tokenizer"),
    ):
        llm.generate([1], ask(dict(regex="a")))
    folder = copy_tiny(
        config={"eos_token_id": None},
        generation_config={"eos_token_id": None},
        tokenizer_config={"eos_token": None},
    )
    with (
        LLM(str(folder), **options) as llm,
        pytest.raises(ValueError, match="structured_outputs need an EOS token"),
    ):
        llm.generate([1], ask(dict(regex="a")))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [dict(), dict(enforce_eager=True), dict(async_scheduling=False)]
)
def test_a_gpu_gives_the_same_tokens(setting, options):
    """With graphs, a step of decodes draws by temperature alone first, then once more."""
    prompts, params, alone = setting
    with LLM(
        str(TINY), device="cuda", dtype="float32", kv_cache_memory_bytes=64 << 20,
        max_model_len=128, max_num_seqs=len(prompts), **options,
    ) as llm:  # fmt: skip
        for _ in range(2):
            assert token_ids(generate(llm, prompts, params)) == token_ids(alone)
