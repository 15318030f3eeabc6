"""Grammars at the edges: text that a tokenizer would change, sources that nest deeply or are large,
and what others see of a caller that compiles one."""

import json
import re
import threading
import time

import numpy as np
import pytest
from conftest import TINY
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nanovllm import LLM, SamplingParams, StructuredOutputsParams
from nanovllm.frontend.structured_outputs import MAX_SOURCE, GrammarCompiler, _lark

pytest.importorskip("llguidance")
pytestmark = pytest.mark.usefixtures("one_thread")

EOS = 2
NFD = "cafe\u0301"
ODD = [
    NFD,
    "\u212b",
    "\ufb01x \uff37ide",
    "a <|im_end|> b",
    "<|im_start|>",
    "\uffff<|im_end|>",
    "é😀 \u1e9b\u0323",
    "  two  ",
]


@pytest.fixture(scope="module")
def compiler():
    return GrammarCompiler(AutoTokenizer.from_pretrained(str(TINY)), 2560, (EOS,))


def texts(compiler, last=True, max_tokens=99, **structured):
    """What a grammar derives when the last, or the first, of the allowed tokens is taken."""
    matcher = compiler.compile(StructuredOutputsParams(**structured)).matcher.deep_copy()
    output = []
    while len(output) < max_tokens:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        assert allowed.size and not matcher.is_error(), matcher.get_error()
        kept = [token for token in allowed.tolist() if token != EOS]
        if not kept:
            return compiler.tokenizer.decode(output)
        output.append(kept[-1 if last else 0])
        assert matcher.consume_token(output[-1])
    return compiler.tokenizer.decode(output)


@pytest.mark.parametrize("text", ODD)
def test_a_grammar_gives_the_text_as_asked(compiler, text):
    quoted = json.dumps(text, ensure_ascii=False)
    assert texts(compiler, choice=[text]) == text
    assert texts(compiler, json={"const": text}) == quoted
    assert texts(compiler, json={"enum": [text]}) == quoted
    assert texts(compiler, regex=text.replace("|", r"\|")) == text
    assert texts(compiler, grammar=f"start: {quoted}") == text
    assert texts(compiler, grammar=f"root ::= {quoted}") == text


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "NFKC"},
        {"type": "Lowercase"},
        {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]},
        {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Replace", "pattern": {"String": "e"}, "content": "E"},
        {"type": "Prepend", "prepend": "x"},
    ],
    ids=lambda normalizer: normalizer["type"],
)  # fmt: skip
def test_whatever_the_tokenizer_normalizes(normalizer):
    form = json.loads((TINY / "tokenizer.json").read_text()) | {"normalizer": normalizer}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(form)))
    compiler = GrammarCompiler(tokenizer, 2560, (EOS,))
    for text in [*ODD, "He said: É!"]:
        assert texts(compiler, choice=[text]) == text


def test_sentencepiece_spaces():
    """Of such a vocabulary a space is a letter, which its normalizer writes."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "▁a", "b"]
    form = {
        "version": "1.0", "truncation": None, "padding": None, "pre_tokenizer": None,
        "post_processor": None,
        "added_tokens": [
            {"id": i, "content": pieces[i], "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": True}
            for i in range(3)
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            {"type": "NFKC"},
        ]},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": True, "ignore_merges": False, "merges": [["▁", "a"]],
                  "vocab": {piece: i for i, piece in enumerate(pieces)}},
    }  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(form)))
    compiler = GrammarCompiler(tokenizer, len(pieces), (EOS,))
    for text in ("a b  a", NFD, "x </s> y", "b"):
        assert texts(compiler, choice=[text]) == text


def test_lark_names_special_tokens(compiler):
    grammar = 'start: "<|im_start|>" <|im_start|> /<.im_end.>/ <|im_end|>* // <|none|>\n'
    assert texts(compiler, grammar=grammar) == "<|im_start|>" + "<|im_start|>" + "<|im_end|>"
    with pytest.raises(ValueError, match=r"unknown special token: .<\|none\|>.") as error:
        texts(compiler, grammar="start: <|none|>")
    assert "\uffff" not in str(error.value)
    tag = {"begin": "<|im_start|>x", "schema": {"const": 1}, "end": "<|im_end|>"}
    tags = {"structures": [tag], "triggers": ["<|im_start|>"]}
    grammar = compiler.compile(StructuredOutputsParams(structural_tag=json.dumps(tags)))
    matcher = grammar.matcher.deep_copy()
    assert matcher.consume_token(1)
    rest = compiler.vocabulary.tokenize_str("x1<|im_end|>")
    assert EOS not in rest and matcher.consume_tokens(rest)


def test_thousands_of_choices(llm):
    names = [f"label-{i:04d}" for i in range(2500)]
    for choices in (names[:1999], names[:2000], names, [*names, "label", "label-00", ""]):
        params = SamplingParams(
            temperature=1.0, seed=1, max_tokens=30,
            structured_outputs=StructuredOutputsParams(choice=choices),
        )  # fmt: skip
        found = [out.outputs[0] for out in llm.generate(["x"] * 4, params, use_tqdm=False)]
        assert {completion.finish_reason for completion in found} == {"stop"}
        assert {completion.text for completion in found} <= set(choices)


def accepts(compiler, schema, text):
    params = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    matcher = compiler.compile(params).matcher.deep_copy()
    tokens = compiler.vocabulary.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_thousands_of_ways_on(compiler):
    words = " | ".join(f'"w{i}"' for i in range(5000, 9000))
    assert texts(compiler, grammar=f"start: {words}").startswith("w")
    schema = {"properties": {f"p{i}": {"const": i} for i in range(3000)}, "type": "object"}
    schema["additionalProperties"] = False
    schema["required"] = ["p7"]
    text = texts(compiler, max_tokens=6, json=schema, disable_any_whitespace=True)
    assert text.startswith('{"p')


@pytest.mark.parametrize("regex", ["\\", "ab\\", "a\\\\\\"])
def test_a_regex_that_ends_in_its_escape(compiler, regex):
    with pytest.raises(ValueError, match="backslash at its end"):
        compiler.compile(StructuredOutputsParams(regex=regex))
    assert texts(compiler, regex=regex + "\\") == re.sub(r"\\(.)", r"\1", regex + "\\")


def test_pattern_properties_hold_for_named_ones(compiler):
    schema = {
        "type": "object",
        "properties": {"ab": {"type": "string", "minLength": 2}, "n": {"type": "integer"}},
        "patternProperties": {"^(a.*|n)$": {"maxLength": 3, "minimum": 5}},
    }
    for text, is_valid in {
        '{"ab":"xx"}': True,
        '{"ab":"x"}': False,
        '{"ab":"xxxx"}': False,
        '{"n":7}': True,
        '{"n":3}': False,
        '{"ax":"y"}': True,
        '{"ax":"yyyy"}': False,
    }.items():
        assert accepts(compiler, schema, text) == is_valid, text
    never = {
        "type": "object",
        "properties": {"ab": {"type": "string"}},
        "patternProperties": {"b": {"type": "integer"}},
        "required": ["ab"],
    }
    with pytest.raises(ValueError, match="'ab' is unsatisfiable"):
        compiler.compile(StructuredOutputsParams(json=never))


def test_schemas_that_are_bools(compiler):
    for text in ('{"a":[1,null]}', "3", '"x"', "true"):
        assert accepts(compiler, "true", text)
    with pytest.raises(ValueError, match="json won't do: no text satisfies the schema false"):
        compiler.compile(StructuredOutputsParams(json="false"))


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "red"\n  | "blue"',
        'root ::=\n "red"  # not "this\n # nor\n\n\t| "blue"  # | "green"\n',
        'root ::= a\r\n | b\r\na ::= "red"\r\nb ::= "blue"\r\n   | "bleu"',
        'root ::= a | "x" [#|"] "]# | \\""\n  | b\na ::= "red"\nb ::= "blue"',
        'root ::= ("red"\n | "blue")\n',
    ],
)
def test_gbnf_with_leading_bars(compiler, grammar):
    compiled = compiler.compile(StructuredOutputsParams(grammar=grammar))
    for text in ("red", "blue", *(['x|]# | "'] if "x" in grammar else [])):
        matcher = compiled.matcher.deep_copy()
        assert matcher.consume_tokens(compiler.vocabulary.tokenize_str(text)), text
        assert matcher.is_accepting()


def test_gbnf_takes_time_in_proportion():
    """Its rules, not their pairs, are looked at: 8,000 rules took 40 s."""
    before = time.process_time()
    lark = _lark(rules(8000, "root", " ::=", ' | "y"\n'))
    assert time.process_time() - before < 20
    assert lark.count(":") == 8002 and "start: A0" in lark


def test_lark_that_mentions_gbnf(compiler):
    assert texts(compiler, grammar='start: "::="') == "::="


# Deep and large sources


def refs(n):
    last = {f"a{n}": {"type": "integer"}}
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(n)}
    return {"$ref": "#/$defs/a0", "$defs": links | last}


def rules(n, start, is_, end, name="a"):
    links = "".join(f"{name}{i}{is_} {name}{i + 1}{end}" for i in range(n))
    return f'{start}{is_} {name}0\n{links}{name}{n}{is_} "x"\n'


DEEP = {
    "refs": dict(json=refs(1100)),
    "refs, closed": dict(json=refs(1101), disable_additional_properties=True),
    "refs as text": dict(json=json.dumps(refs(5000))),
    "lark": dict(grammar=rules(3000, "start", ":", "\n")),
    "lark of many": dict(grammar=rules(30000, "start", ":", "\n")),
    "gbnf": dict(grammar=rules(500, "root", " ::=", ' | "y"\n')),
    "terminals": dict(grammar=rules(9000, "start", ":", "\n", "A")),
    "tag": dict(structural_tag=json.dumps(
        {"structures": [{"begin": "<a", "schema": refs(1100), "end": ">"}], "triggers": ["<a"]}
    )),
}  # fmt: skip


@pytest.mark.parametrize("structured", DEEP.values(), ids=DEEP)
def test_chains_of_rules_compile_on_a_stack_of_their_own(llm, structured):
    params = SamplingParams(
        max_tokens=3, temperature=0, structured_outputs=StructuredOutputsParams(**structured)
    )
    stack_size = threading.stack_size()
    [output] = llm.generate("a", params, use_tqdm=False)
    assert output.outputs[0].finish_reason in ("stop", "length") and output.outputs[0].token_ids
    assert threading.stack_size() == stack_size


def nested(n):
    value = []
    for _ in range(n):
        value = [value]
    return value


def nested_schema(n):
    schema = {}
    for _ in range(n):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize(
    ("structured", "message"),
    [
        (dict(grammar="start: a\n" + "// \n" * (MAX_SOURCE // 4)), "has 2097161 bytes, and may"),
        (dict(grammar="start: " + "(" * 9999 + '"x"' + ")" * 9999), "too deeply nested"),
        (dict(regex="(" * 9999 + "x" + ")" * 9999), "invalid regex"),
        (dict(json=refs(20000)), "schema too large"),
        (dict(json=nested_schema(500)), "recursion limit"),
        (dict(json=nested_schema(985)), "nested too deeply"),
        (dict(json=nested_schema(3000)), "nested too deeply"),
        (dict(json=nested_schema(985), disable_additional_properties=True), "nested too deeply"),
        (dict(json='{"items":' * 985 + "{}" + "}" * 985), "nested too deeply"),
        (dict(structural_tag='{"a":' * 2000 + "{}" + "}" * 2000), "nested too deeply"),
    ],
)  # fmt: skip
def test_sources_too_deep_or_too_large_are_refused(llm, structured, message):
    with pytest.raises(ValueError, match=message):
        params = SamplingParams(structured_outputs=StructuredOutputsParams(**structured))
        llm.generate(["a", "b"], [SamplingParams(), params], use_tqdm=False)
    assert llm.is_finished()


@pytest.mark.parametrize("depth", [500, 985, 3000])
def test_deep_values_are_refused(llm, depth):
    value = nested(depth)
    for ask in (
        lambda: SamplingParams(stop=value),
        lambda: SamplingParams(logit_bias=value),
        lambda: SamplingParams(temperature=value),
        lambda: StructuredOutputsParams(choice=value),
        lambda: llm.generate(value),
        lambda: llm.generate("a", value),
        lambda: llm.chat([{"role": "user", "content": value}]),
        lambda: llm.chat([{"role": "user", "content": "x", "tool_calls": value}]),
        lambda: llm.chat(value),
    ):
        with pytest.raises((ValueError, TypeError)):
            ask()


# Others


def test_a_caller_that_compiles_delays_no_other(llm, monkeypatch):
    compiler, begun, goes_on = llm._requests.grammars, threading.Event(), threading.Event()
    compile_one = compiler._compile

    def slow(params):
        if params.regex == "[s]low":
            begun.set()
            assert goes_on.wait(60)
        return compile_one(params)

    monkeypatch.setattr(compiler, "_compile", slow)
    found = []

    def generate(pattern):
        structured = StructuredOutputsParams(regex=pattern)
        params = SamplingParams(max_tokens=9, structured_outputs=structured)
        found.append(llm.generate("a", params, use_tqdm=False)[0].outputs[0].text)

    thread = threading.Thread(target=generate, args=("[s]low",))
    thread.start()
    assert begun.wait(60)
    generate("[q]uick")
    assert found == ["quick"]
    goes_on.set()
    thread.join(60)
    assert found == ["quick", "slow"]


def test_deep_lines_of_a_batch_file_are_error_records(tmp_path):
    from nanovllm.entrypoints.run_batch import run_batch

    source, results = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    say, form = '"messages": [{"role": "user", "content": %s}], ', '"response_format": %s, '
    schema = '{"type": "json_schema", "json_schema": {"schema": %s}}'
    hi = say % '"hi"'
    bodies = {"first": hi}
    for n in (500, 980, 985, 990, 3000):
        deep = "[" * n + "]" * n
        bodies |= {
            f"stop {n}": hi + f'"stop": {deep}, ',
            f"content {n}": say % deep,
            f"schema {n}": hi + form % (schema % ('{"items": ' * n + "{}" + "}" * n)),
            f"template {n}": hi + f'"tools": {deep}, ',
        }
    bodies["refs"] = hi + form % (schema % json.dumps(refs(20000)))
    bodies["last"] = hi
    source.write_text(
        "".join(
            f'{{"custom_id": "{name}", "method": "POST", "url": "/v1/chat/completions", '
            f'"body": {{{body}"max_tokens": 2}}}}\n'
            for name, body in bodies.items()
        )
    )
    run_batch(lambda: LLM(str(TINY), max_model_len=256), source, results, use_tqdm=False)
    records = [json.loads(line) for line in results.read_text().splitlines()]
    good = {r["custom_id"] for r in records if r["response"]["status_code"] == 200}
    bad = [r for r in records if r["response"]["status_code"] == 400]
    assert good == {"first", "last"} and len(bad) == len(bodies) - 2
    assert all(r["error"]["message"] for r in bad)
