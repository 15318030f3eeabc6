"""StructuredOutputsParams -> compiled grammars, which say what tokens may come next, by llguidance.

requests.py compiles them before requests are posted, in the caller's thread; the worker gives each
row a matcher of its own and advances it (worker/host_processors.py).
"""

import json
import os
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from nanovllm.core.step import NO_WAY_ON
from nanovllm.sampling_params import StructuredOutputsParams, refuses_deep_nesting

NUM_KEPT = 1024  # compiled grammars, for later requests with the same one
# llguidance follows rules and $refs by recursion, 9 kB of stack for each. A rule takes some bytes
# of the source, so a stack in proportion to it suffices; the system gives only what is touched.
MAX_SOURCE = 2**21  # bytes
STACK, STACK_PER_BYTE = 2**24, 512
Result = TypeVar("Result")
# llguidance's bounds of a step, for texts that may go on in many ways. 2,000 is its own.
MAX_ITEMS = 50_000
# In front of a special token's name no text has it: what a text may spell is known beforehand.
HIDDEN = "\uffff" + secrets.token_hex(8)
# What may hold <...> in a Lark grammar, and special tokens.
LARK = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|//.*|#.*|<[^<>\s]+>')
# Of a GBNF grammar its literals and classes; and the white space and comments before a bar, or not.
GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|(?:\s|#[^\n]*(?:\n|$))+(?P<bar>\|)?')
# JSON Schema's keywords for named schemas, and keywords for plain values.
NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
VALUES = ("const", "enum", "default", "examples")


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. Another process gets its source alone, and binds it to a vocabulary.

    Attributes:
        source: the grammar in llguidance's form.
        num_words: 32-bit words of a bitmask over its vocabulary.
        matcher: an llguidance.LLMatcher in its first state, which each row copies; None: not bound.
    """

    source: str
    num_words: int
    matcher: Any = None

    def bind(self, vocabulary: Any) -> "Grammar":
        """With a matcher over an llguidance.LLTokenizer.

        Raises:
            ValueError: the grammar is wrong or too large, or has what llguidance lacks.
        """
        from llguidance import LLMatcher, LLParserLimits

        def make() -> Any:
            limits = LLParserLimits(max_items_in_row=MAX_ITEMS)
            matcher = LLMatcher(vocabulary, self.source, log_level=0, limits=limits)
            if not matcher.is_error():
                # The first mask may take seconds: copies have most of it, and no step waits.
                matcher.compute_bitmask()
            return matcher

        num_bytes = len(self.source.encode())
        if num_bytes > MAX_SOURCE:
            raise ValueError(f"it has {num_bytes} bytes, and may have {MAX_SOURCE}")
        # Other threads run meanwhile: it gives up the interpreter's lock.
        matcher = _with_stack(STACK + STACK_PER_BYTE * num_bytes, make)
        if matcher.is_error() and not matcher.get_error().startswith(NO_WAY_ON):
            raise ValueError(matcher.get_error().replace(HIDDEN, ""))
        return replace(self, matcher=matcher)

    def allows(self, token_ids: list[int]) -> list[bool]:
        """Whether each token may come first."""
        bits = self.matcher.compute_bitmask()
        return [bool(bits[token // 8] >> token % 8 & 1) for token in token_ids]

    def after(self, token_id: int) -> "Grammar":
        """What may come after this token, which may come first."""
        matcher = self.matcher.deep_copy()
        matcher.consume_token(token_id)
        return replace(self, matcher=matcher)

    def __reduce__(self) -> Any:
        return Grammar, (self.source, self.num_words)


class GrammarCompiler:
    """Compiles each grammar once. Several threads may use it.

    Args:
        tokenizer: transformers' tokenizer, or None.
        vocab_size: size of the model's logits.
        eos_token_ids: tokens that may be sampled where a grammar can end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_token_ids = eos_token_ids
        self.vocabulary: Any = None  # llguidance's, made for the first grammar
        self.special: dict[str, int] = {}  # the special tokens, which a Lark grammar may name
        self.compiled: dict[str, Grammar] = {}
        self.start_anew()

    def start_anew(self) -> None:
        """In a forked process, where another thread may have held a lock."""
        # Of the vocabulary and what is compiled; a signal's handler may come in between.
        self.lock = threading.RLock()

    @refuses_deep_nesting("structured_outputs")
    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Raises:
        ValueError: the grammar is wrong, or has what llguidance lacks; there is no tokenizer or
            no EOS token; or no llguidance.
        """
        key = repr(params)
        grammar = self.compiled.get(key)
        if grammar is None:
            grammar = self._compile(params)
            with self.lock:
                if len(self.compiled) >= NUM_KEPT:
                    self.compiled.pop(next(iter(self.compiled)), None)
                self.compiled[key] = grammar
        return grammar

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        try:
            import llguidance  # noqa: F401
        except ImportError:
            raise ValueError(
                "structured_outputs need the llguidance package: pip install 'nanovllm[structured]'"
            ) from None
        with self.lock:
            self._read_vocabulary()
        try:
            source = self._source(params)
            return Grammar(source, -(-self.vocabulary.vocab_size // 32)).bind(self.vocabulary)
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as wrong:
            error = str(wrong) if isinstance(wrong, ValueError) else repr(wrong)
        raise ValueError(f"structured_outputs: {params.kind} won't do: {error.strip()}")

    def _read_vocabulary(self) -> None:
        """As llguidance has it: tokens are their bytes, and text becomes tokens as it stands."""
        if self.vocabulary is not None:
            return
        if self.tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and skip_tokenizer_init=True")
        if not self.eos_token_ids:
            raise ValueError("structured_outputs need an EOS token; the checkpoint names none")
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                f"structured_outputs need a tokenizer of the tokenizers package (a tokenizer.json),"
                f" not {type(self.tokenizer).__name__}"
            )
        from llguidance import LLTokenizer

        form = json.loads(backend.to_str())
        self.special = {token["content"]: token["id"] for token in form["added_tokens"]}
        size = max(self.vocab_size, len(self.tokenizer))
        self.vocabulary = LLTokenizer(
            json.dumps(_verbatim(form)), n_vocab=size, eos_token=list(self.eos_token_ids)
        )

    def _source(self, params: StructuredOutputsParams) -> str:
        """The grammar as llguidance takes it; it may still be wrong."""
        from llguidance import LLMatcher

        if params.json is not None:
            schema = params.json
            return _json_grammar(json.loads(schema) if isinstance(schema, str) else schema, params)
        if params.json_object:
            return _json_grammar({"type": "object"}, params)
        if params.regex is not None:
            if "\0" in params.regex:
                raise ValueError("it has a NUL character")
            if re.search(r"(?<!\\)(\\\\)*\\\Z", params.regex):  # llguidance would drop it
                raise ValueError("a backslash at its end escapes nothing")
            return LLMatcher.grammar_from_regex(params.regex)
        if params.choice is not None:
            # A terminal: a rule has at most 2,000 alternatives.
            choices = " | ".join(map(json.dumps, dict.fromkeys(params.choice)))
            return f"start: CHOICE\nCHOICE: {choices}"
        if params.grammar is not None:
            # As in vLLM: Lark's syntax has no "::=".
            if "::=" in params.grammar:
                return _lark(params.grammar)
            return self._by_number(params.grammar)
        assert params.structural_tag is not None
        return self._by_number(self._tag_grammar(json.loads(params.structural_tag), params))

    def _by_number(self, lark: str) -> str:
        """A Lark grammar that names special tokens by number: their names are hidden."""

        def by_number(found: re.Match) -> str:
            token_id = self.special.get(found[0])
            return found[0] if token_id is None else f"<[{token_id}]>"

        return LARK.sub(by_number, lark)

    def _tag_grammar(self, content: dict[str, Any], params: StructuredOutputsParams) -> str:
        from llguidance import StructTag

        if "structures" not in content:
            raise ValueError("it must be an object of 'structures' and 'triggers'")
        tags = []
        for structure in content["structures"]:
            begin = structure["begin"]
            trigger = next((t for t in content["triggers"] if begin.startswith(t)), None)
            if not trigger:
                raise ValueError(f"no trigger begins {begin!r}")
            grammar = _json_grammar(structure["schema"], params)
            tags.append(
                StructTag(trigger=trigger, begin=begin, grammar=grammar, end=structure["end"])
            )
        special = self.tokenizer.all_special_tokens
        return StructTag.to_grammar(tags, assume_special=any(t.trigger in special for t in tags))


_starting = threading.RLock()  # threading.stack_size is that of all threads that start


def _start_anew() -> None:
    """In a forked process, where another thread may have held the lock."""
    global _starting
    _starting = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def _with_stack(size: int, function: Callable[[], Result]) -> Result:
    """The function's result, or its error, from a thread with a stack of this size."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="nanovllm grammar", daemon=True)
    with _starting:
        before = threading.stack_size(-(-size // 2**20) * 2**20)
        try:
            thread.start()
        except RuntimeError as error:
            raise ValueError(f"its compiler needs {size} bytes of stack: {error}") from None
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _verbatim(form: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json whose text becomes tokens of the same text. A normalizer would make other
    text of some; and special tokens that a text spells are text, so their names become names that
    no text has."""
    hidden = {token["content"] for token in form["added_tokens"]}
    tokens = [{**token, "content": HIDDEN + token["content"]} for token in form["added_tokens"]]
    model, vocab = form["model"], form["model"]["vocab"]
    if isinstance(vocab, dict):
        vocab = {HIDDEN * (name in hidden) + name: token_id for name, token_id in vocab.items()}
    return {
        **form,
        "added_tokens": tokens,
        "normalizer": _spaces_alone(form["normalizer"]),
        "model": {**model, "vocab": vocab},
        **dict.fromkeys(("truncation", "padding", "post_processor")),
    }


def _spaces_alone(normalizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Of a tokenizer.json's normalizer what writes spaces as the vocabulary does (sentencepiece's
    do)."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return normalizer
    if normalizer["type"] == "Sequence":
        parts = [_spaces_alone(part) for part in normalizer["normalizers"]]
        return {"type": "Sequence", "normalizers": [part for part in parts if part is not None]}
    is_space = normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "}
    return normalizer if is_space else None


def _lark(gbnf: str) -> str:
    """GBNF as Lark. llguidance takes no line that begins with a bar. It looks for terminals rule by
    rule until it finds no more, so the last rules, which others name, come first: else a chain of
    3,000 rules takes 6 s of Python, in which each step of the engine waits for its turn."""
    from llguidance.gbnf_to_lark import GrammarParser, is_lark_syntax, resolve

    if is_lark_syntax(gbnf):
        return gbnf
    joined = GBNF.sub(lambda found: " |" if found["bar"] else found[0], gbnf)
    try:
        rules = dict(reversed(GrammarParser().parse(joined).items()))
        resolve(rules)
    except Exception as error:  # of its own kinds
        raise ValueError(f"it is not GBNF: {error}") from None
    return "\n\n".join(["%llguidance {}", *map(str, rules.values())])


def _json_grammar(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

    if schema is False:
        raise ValueError("no text satisfies the schema false")
    if schema is True:  # any value
        schema = {}
    if params.disable_additional_properties:
        schema = _closed(schema)
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema),
        defaults={
            "whitespace_flexible": not params.disable_any_whitespace,
            "whitespace_pattern": params.whitespace_pattern,
        },
    )


def _closed(schema: Any) -> Any:
    """The schema with additionalProperties false wherever it names properties and does not set
    it."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in NAMED_SCHEMAS and isinstance(value, dict):
            result[key] = {name: _closed(named) for name, named in value.items()}
        else:
            result[key] = value if key in VALUES else _closed(value)
    if {"properties", "patternProperties"} & set(schema):
        result.setdefault("additionalProperties", False)
    return result
