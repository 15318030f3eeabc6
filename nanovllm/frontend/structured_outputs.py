"""StructuredOutputsParams -> compiled grammars, which say what tokens may come next, by llguidance.

requests.py compiles them before requests are posted; the worker gives each row a matcher of its own
and advances it (worker/host_processors.py).
"""

import json
from dataclasses import dataclass, replace
from typing import Any

from nanovllm.sampling_params import StructuredOutputsParams

NUM_KEPT = 1024  # compiled grammars, for later requests with the same one
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
        """With a matcher over an llguidance.LLTokenizer."""
        from llguidance import LLMatcher

        return replace(self, matcher=LLMatcher(vocabulary, self.source, log_level=0))

    def __reduce__(self) -> Any:
        return Grammar, (self.source, self.num_words)


class GrammarCompiler:
    """Compiles each grammar once.

    Args:
        tokenizer: transformers' tokenizer, or None.
        vocab_size: size of the model's logits.
        eos_token_ids: tokens that may be sampled where a grammar can end.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: tuple[int, ...]):
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.eos_token_ids = eos_token_ids
        self.vocabulary: Any = None  # llguidance's, made for the first grammar
        self.compiled: dict[str, Grammar] = {}

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """Raises:
        ValueError: the grammar is wrong, or has what llguidance lacks; there is no tokenizer or
            no EOS token; or no llguidance.
        """
        key = repr(params)
        if key not in self.compiled:
            grammar = self._compile(params)
            if len(self.compiled) >= NUM_KEPT:
                del self.compiled[next(iter(self.compiled))]
            self.compiled[key] = grammar
        return self.compiled[key]

    def _compile(self, params: StructuredOutputsParams) -> Grammar:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise ValueError(
                "structured_outputs need the llguidance package: pip install 'nanovllm[structured]'"
            ) from None
        self._read_vocabulary()
        try:
            source = self._source(params)
            error = LLMatcher.validate_grammar(source, self.vocabulary)
        except (ValueError, KeyError, TypeError, AssertionError, AttributeError) as wrong:
            error = str(wrong) if isinstance(wrong, ValueError) else repr(wrong)
        if error:
            raise ValueError(f"structured_outputs: {params.kind} won't do: {error.strip()}")
        return Grammar(source, -(-self.vocabulary.vocab_size // 32)).bind(self.vocabulary)

    def _read_vocabulary(self) -> None:
        if self.vocabulary is not None:
            return
        if self.tokenizer is None:
            raise ValueError("structured_outputs need a tokenizer, and skip_tokenizer_init=True")
        if not self.eos_token_ids:
            raise ValueError("structured_outputs need an EOS token; the checkpoint names none")
        from llguidance.hf import from_tokenizer

        size = max(self.vocab_size, len(self.tokenizer))
        self.vocabulary = from_tokenizer(self.tokenizer, size, eos_token=list(self.eos_token_ids))

    def _source(self, params: StructuredOutputsParams) -> str:
        """The grammar as llguidance takes it; it may still be wrong."""
        from llguidance import LLMatcher, grammar_from

        if params.json is not None:
            schema = params.json
            return _json_grammar(json.loads(schema) if isinstance(schema, str) else schema, params)
        if params.json_object:
            return _json_grammar({"type": "object"}, params)
        if params.regex is not None:
            if "\0" in params.regex:
                raise ValueError("it has a NUL character")
            return LLMatcher.grammar_from_regex(params.regex)
        if params.choice is not None:
            return grammar_from("choice", json.dumps(params.choice))
        if params.grammar is not None:
            # As in vLLM: Lark's syntax has no "::=".
            return grammar_from("gbnf" if "::=" in params.grammar else "lark", params.grammar)
        assert params.structural_tag is not None
        return self._tag_grammar(json.loads(params.structural_tag), params)

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


def _json_grammar(schema: Any, params: StructuredOutputsParams) -> str:
    from llguidance import LLMatcher

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
