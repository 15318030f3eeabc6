"""SamplingParams: how one request's tokens are chosen and when it ends. Names, defaults and
meanings are vLLM's.

Users construct it; frontend/requests.py copies it; the sampler and the stop checks read it.
"""

import copy
import inspect
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from enum import Enum
from functools import cached_property
from numbers import Integral, Real
from typing import Any

logger = logging.getLogger(__name__)

UNSUPPORTED = (
    "extra_args",
    "logprob_token_ids",
    "repetition_detection",
    "routed_experts_prompt_start",
    "thinking_token_budget",
)
INSTEAD = {"extra_args": "; a function in logits_processors may hold them"}
MAX_LOGPROBS = 20  # vLLM's default of max_logprobs
MAX_SAMPLES = 16384  # of a request, as in vLLM
_KINDS: dict[str, Any] = {  # of structured outputs
    "json": str | dict,
    "regex": str,
    "choice": list | tuple,
    "grammar": str,
    "json_object": bool,
    "structural_tag": str,
}
MIN_TEMPERATURE = 0.01  # vLLM's; 0 is greedy
GREEDY_TEMPERATURE = 1e-5  # below it the softmax is one-hot in float32: treated as greedy


@contextmanager
def refuses_deep_nesting(name: str) -> Iterator[None]:
    """What reads a value by recursion, or shows it in an error, raises a ValueError where the value
    is nested more deeply than Python recurses. A decorator too."""
    try:
        yield
    except RecursionError:
        raise ValueError(f"{name}: a value is nested too deeply") from None


class RequestOutputKind(Enum):
    """The outputs of step(), stream and AsyncLLM for a running request; generate always returns
    final outputs."""

    CUMULATIVE = 0  # all tokens so far
    DELTA = 1  # the tokens since the last output
    FINAL_ONLY = 2  # one output, when the request has ended


@dataclass
class StructuredOutputsParams:
    """The form that a request's text must have: one of json, regex, choice, grammar, json_object
    and structural_tag; the other fields say how it is read.

    Args:
        json: a JSON Schema, as a dict or as text; the text validates against it.
        regex: the whole text matches it. Rust's syntax: no look-around, no back-references.
        choice: the text is one of these strings.
        grammar: the grammar derives the text; Lark or, with `::=`, GBNF (EBNF) syntax.
        json_object: True: the text is any JSON object.
        disable_any_whitespace: JSON without white space.
        disable_additional_properties: objects whose schema names properties have no others, unless
            the schema allows them.
        whitespace_pattern: a regex of the white space in JSON.
        structural_tag: JSON of {"structures": [{"begin", "schema", "end"}], "triggers": [...]}:
            free text, in which each trigger begins one of the structures.

    Raises:
        ValueError: none of the kinds is given, or several, or an empty one.
        TypeError: a value has the wrong type.
    """

    json: str | dict | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None

    @refuses_deep_nesting("structured_outputs")
    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"structured_outputs take exactly one of {', '.join(_KINDS)}; "
                f"got {' and '.join(given) or 'none'}"
            )
        [self.kind] = given
        value = getattr(self, self.kind)
        types: dict[str, Any] = {self.kind: _KINDS[self.kind], "whitespace_pattern": str | None}
        types |= {"disable_any_whitespace": bool, "disable_additional_properties": bool}
        for name, kind in types.items():
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"structured_outputs: {name} can't be {getattr(self, name)!r:.80}")
        if value != {} and not value:
            raise ValueError(f"structured_outputs: {self.kind} is {value!r}, which says nothing")
        if self.kind == "choice" and not all(isinstance(text, str) for text in value):
            raise TypeError(f"structured_outputs: choice must be strings, got {value!r:.80}")


# For each number of SamplingParams: its type, whether a value is valid, and the rule in words.
_LOGPROBS = (int, lambda n: 0 <= n <= MAX_LOGPROBS, f"be in [0, {MAX_LOGPROBS}], or None for none")
_NUMBERS: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (float, lambda t: 0 <= t <= 2, "be in [0, 2] (0 is greedy)"),
    "top_p": (float, lambda p: 0 < p <= 1, "be in (0, 1] (1 keeps every token)"),
    "min_p": (float, lambda p: 0 <= p <= 1, "be in [0, 1] (0 keeps every token)"),
    "presence_penalty": (float, lambda p: -2 <= p <= 2, "be in [-2, 2] (0 changes nothing)"),
    "frequency_penalty": (float, lambda p: -2 <= p <= 2, "be in [-2, 2] (0 changes nothing)"),
    "repetition_penalty": (
        float,
        lambda p: 0 < p < math.inf,
        "be above 0 and finite (1 changes nothing)",
    ),
    "n": (int, lambda n: 1 <= n <= MAX_SAMPLES, f"be in [1, {MAX_SAMPLES}]"),
    "top_k": (int, lambda k: k >= -1, "be at least 1, or 0 or -1 to keep every token"),
    "min_tokens": (int, lambda n: n >= 0, "be at least 0"),
    "max_tokens": (int, lambda n: n >= 1, "be at least 1, or None for no limit of its own"),
    "logprobs": _LOGPROBS,
    "prompt_logprobs": _LOGPROBS,
    "seed": (int, lambda s: -(2**63) <= s < 2**63, "fit in 64 bits"),
}
_MAY_BE_NONE = ("max_tokens", "logprobs", "prompt_logprobs", "seed")
_FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "flat_logprobs",
)
_TYPES: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(_FLAGS, (bool, "a bool")),
    "skip_reading_prefix_cache": (bool | None, "a bool"),
    "output_kind": (RequestOutputKind, "a RequestOutputKind"),
    "structured_outputs": (StructuredOutputsParams | None, "StructuredOutputsParams"),
}


@dataclass
class SamplingParams:
    """Sampling parameters of a request.

    Args:
        n: samples of the prompt, each a CompletionOutput; greedy requests have one.
        temperature: divides the logits, in [0, 2]; 0 is greedy (the token with the highest logit).
            Above 0 it is at least 0.01: less is raised to that, with a warning, as in vLLM.
        top_p: keeps the smallest set of most likely tokens whose probabilities reach top_p, in (0,
            1].
        top_k: keeps the top_k most likely tokens; 0 or -1 keeps all.
        min_p: drops tokens less likely than min_p times the most likely one, in [0, 1].
        max_tokens: largest number of generated tokens; None: up to max_model_len.
        min_tokens: before this many tokens no EOS or stop token is sampled, and no stop string ends
            the request.
        ignore_eos: generate on after an EOS token.
        stop_token_ids: tokens that end the request, besides EOS; the last one stays out of the
            text.
        stop: strings that end the request as soon as its text contains one; the text is cut before
            it.
        include_stop_str_in_output: keep the stop string, or the text of the stop or EOS token.
        detokenize: False: outputs have no text.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: passed to the tokenizer; fast tokenizers ignore it.
        output_kind: the outputs of step() for the request.
        presence_penalty: subtracted once from the logit of each token that was generated before,
            in [-2, 2].
        frequency_penalty: subtracted for each time that a token was generated, in [-2, 2].
        repetition_penalty: for tokens of the prompt and the output, logits above 0 are divided by
            it and others multiplied; above 0, 1 changes nothing.
        logit_bias: token id -> number that is added to its logit.
        allowed_token_ids: the only tokens that may be sampled.
        bad_words: texts that are not generated: a token that would complete one is not sampled.
        logprobs: number of most likely tokens whose log-probabilities are returned beside each
            generated token's, in [0, 20]; None: no log-probabilities.
        prompt_logprobs: the same for each token of the prompt but the first. Such a request takes
            no prefix hits.
        logits_processors: callables, applied in turn: (output token ids, logits) or (prompt token
            ids, output token ids, logits) -> logits. Token ids are lists of ints, logits [vocab]
            float32 on the model's device, which may be changed in place.
        structured_outputs: the form that the text must have; StructuredOutputsParams.
        seed: in float32 the same seed draws the same tokens whatever else is in the batch, other
            tokens for each sample; None or -1: a seed made from the engine's.
        flat_logprobs: log-probabilities are FlatLogprobs: numbers of all tokens in one list each.
        skip_reading_prefix_cache: compute the whole prompt, without prefix hits.
        extra_args, logprob_token_ids, repetition_detection, routed_experts_prompt_start,
            thinking_token_budget: vLLM's, not supported: only the default is accepted.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    # In vLLM's order: scripts give the first ones by position.
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: list[int] | None = field(default=None, repr=False)
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    _: KW_ONLY
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logits_processors: list[Callable] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: dict[str, Any] | None = field(default=None, repr=False)
    repetition_detection: Any = field(default=None, repr=False)
    routed_experts_prompt_start: int = field(default=0, repr=False)
    thinking_token_budget: int | None = field(default=None, repr=False)
    # Made from bad_words and structured_outputs by frontend/requests.py, which has the tokenizer.
    bad_words_token_ids: list[list[int]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )
    grammar: Any = field(default=None, init=False, repr=False, compare=False)

    @refuses_deep_nesting("sampling_params")
    def __post_init__(self) -> None:
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is True:  # as in vLLM
                setattr(self, name, 1)
        # Thousands of objects may be made before a batch starts, nearly all values the defaults.
        for name, value in vars(self).items():
            if value is not _DEFAULTS.get(name, value):
                setattr(self, name, _checked(name, value))
        if self.seed == -1:  # as in vLLM
            self.seed = None
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning(
                "temperature=%s is raised to %s: 0 is greedy", self.temperature, MIN_TEMPERATURE
            )
            self.temperature = MIN_TEMPERATURE
        if self.n > 1 and self.is_greedy:
            raise ValueError(
                f"n must be 1 when sampling is greedy (temperature 0), got {self.n}: all samples "
                f"would be the same"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        given = {"logit_bias", "allowed_token_ids", "logits_processors", "structured_outputs"}
        given = {name for name in given if getattr(self, name) is not None}
        for name in ("stop_token_ids", "stop", "bad_words"):
            value = getattr(self, name)
            if value is None or (type(value) is list and not value):
                setattr(self, name, [])  # a list of its own, also where none is given, as in vLLM
            else:
                given.add(name)
        if given:
            self._check_token_ids()
            self._check_texts()
            self._check_constraints()

    @classmethod
    def from_optional(cls, **values: Any) -> "SamplingParams":
        """Make parameters from JSON values, as vLLM does: None stands for the default (for
        max_tokens: no limit), keys of logit_bias may be strings, and its values are clipped to
        [-100, 100].

        Raises:
            ValueError, TypeError: as the constructor.
        """
        if isinstance(bias := values.get("logit_bias"), dict):
            try:
                clipped = {int(token): min(100.0, max(-100.0, b)) for token, b in bias.items()}
            except (TypeError, ValueError):
                raise ValueError(f"logit_bias must be token id -> bias, got {bias!r:.80}") from None
            values["logit_bias"] = clipped
        return cls(**{k: v for k, v in values.items() if v is not None or k == "max_tokens"})

    def clone(self) -> "SamplingParams":
        """A deep copy."""
        return copy.deepcopy(self)

    def _check_token_ids(self) -> None:
        self.stop_token_ids = _as_token_ids("stop_token_ids", self.stop_token_ids)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, dict):
                raise TypeError(
                    f"logit_bias must be a dict of token id -> bias, got {self.logit_bias!r:.80}"
                )
            ids = _as_token_ids("logit_bias's keys", list(self.logit_bias))
            values = [_as_number("a bias", b, float) for b in self.logit_bias.values()]
            if not all(bias < math.inf for bias in values):
                raise ValueError(f"logit_bias must be finite or -inf, got {self.logit_bias!r:.80}")
            self.logit_bias = dict(zip(ids, values, strict=True))
        if self.allowed_token_ids is not None:
            ids = _as_token_ids("allowed_token_ids", self.allowed_token_ids)
            if not ids:
                raise ValueError("allowed_token_ids is empty: name a token, or None allows all")
            self.allowed_token_ids = ids

    def _check_texts(self) -> None:
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (list, tuple)) or any(not isinstance(s, str) for s in stop):
            raise TypeError(f"stop must be a string or a list of strings, got {self.stop!r}")
        if "" in stop:
            raise ValueError("stop cannot contain an empty string")
        if stop and not self.detokenize:
            raise ValueError("stop is searched for in the text: it needs detokenize=True")
        self.stop = list(stop)
        words = self.bad_words
        if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
            raise TypeError(f"bad_words must be a list of strings, got {words!r:.80}")
        if not all(words):
            raise ValueError(f"bad_words must not have an empty string, got {words!r:.80}")
        self.bad_words = list(dict.fromkeys(words))

    def _check_constraints(self) -> None:
        if self.logits_processors is not None:
            processors = self.logits_processors
            if not isinstance(processors, (list, tuple)) or not all(map(callable, processors)):
                raise TypeError(
                    f"logits_processors must be a list of callables, got {processors!r:.80}"
                )
            for processor in processors:
                takes_prompt(processor)
            self.logits_processors = list(processors)
        if self.structured_outputs is not None:
            self.structured_outputs = replace(self.structured_outputs)  # checks it again

    @cached_property
    def stop_numbers(self) -> dict[str, int]:
        """The place of each stop string in the list."""
        return {stop: i for i, stop in reversed([*enumerate(self.stop or ())])}

    @cached_property
    def stop_lengths(self) -> list[int]:
        """Of stop strings, ascending."""
        return sorted({len(stop) for stop in self.stop or ()})

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def changes_logits(self) -> bool:
        """Whether the request's tokens are drawn from other logits than the model's."""
        return bool(
            self.penalizes
            or self.logit_bias
            or self.allowed_token_ids
            or self.bad_words_token_ids
            or self.needs_host
        )

    @property
    def needs_host(self) -> bool:
        """Whether the host must see each token before the next one is drawn."""
        return self.structured_outputs is not None or bool(self.logits_processors)

    @property
    def reads_history(self) -> bool:
        """Whether the device changes the request's logits by its known tokens."""
        return self.penalizes or any(len(word) > 1 for word in self.bad_words_token_ids)

    @property
    def needs_history(self) -> bool:
        """Whether the request's logits depend on its known tokens."""
        return self.reads_history or self.needs_host

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams) if f.init}


def _checked(name: str, value: Any) -> Any:
    """A field's value, checked by itself; numbers become Python's own types."""
    if name in UNSUPPORTED and value != _DEFAULTS[name]:
        raise ValueError(f"{name} is not supported: leave it out{INSTEAD.get(name, '')}")
    if name in _TYPES:
        types, wanted = _TYPES[name]
        if not isinstance(value, types):
            raise TypeError(f"{name} must be {wanted}, got {value!r:.80}")
    if name in _NUMBERS and not (value is None and name in _MAY_BE_NONE):
        kind, is_fine, wanted = _NUMBERS[name]
        value = _as_number(name, value, kind)
        if not is_fine(value):
            raise ValueError(f"{name} must {wanted}, got {value}")
    return value


@dataclass
class BeamSearchParams:
    """Parameters of LLM.beam_search.

    Args:
        beam_width: number of beams kept at each token, and returned; at most 10, as each beam needs
            the log-probabilities of 2 * beam_width tokens.
        max_tokens: largest number of generated tokens.
        ignore_eos: generate on after an EOS token.
        temperature: above 0 each beam gets one more candidate, drawn at this temperature.
        length_penalty: a sum of log-probabilities is divided by the number of tokens, prompt
            included, to this power; in [-16, 16]. Above 0 it favours long texts.
        include_stop_str_in_output: the text shows the EOS token that ended it.
        structured_outputs: the form that the generated texts must have. A beam ends where its text
            can't go on, also with ignore_eos.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    temperature: float = 0.0
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputsParams | None = None

    @refuses_deep_nesting("params")
    def __post_init__(self) -> None:
        for name in ("beam_width", "max_tokens"):
            setattr(self, name, _as_number(name, getattr(self, name), int))
        for name in ("temperature", "length_penalty"):
            setattr(self, name, _as_number(name, getattr(self, name), float))
        if not 1 <= self.beam_width <= MAX_LOGPROBS // 2:
            raise ValueError(
                f"beam_width must be in [1, {MAX_LOGPROBS // 2}], got {self.beam_width}: each beam "
                f"needs 2 * beam_width log-probabilities, and a row has {MAX_LOGPROBS}"
            )
        if not -16 <= self.length_penalty <= 16:  # its powers stay in a float's range
            raise ValueError(f"length_penalty must be in [-16, 16], got {self.length_penalty}")
        checked = SamplingParams(
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            include_stop_str_in_output=self.include_stop_str_in_output,
            structured_outputs=self.structured_outputs,
        )
        self.structured_outputs = checked.structured_outputs


def takes_prompt(processor: Callable) -> bool:
    """Whether a logits processor takes three arguments, not two.

    Raises:
        TypeError: it takes neither number of arguments.
    """
    try:
        signature = inspect.signature(processor)
    except ValueError:  # written in C
        return False
    for arguments in ((None,) * 2, (None,) * 3):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return len(arguments) == 3
    raise TypeError(
        f"a logits processor takes (output token ids, logits) or (prompt token ids, output token "
        f"ids, logits); {processor!r:.80} has the parameters {signature}"
    )


def _as_number(name: str, value: Any, kind: type) -> int | float:
    """Python's own int or float for a number of any type, for example numpy's."""
    wanted = Integral if kind is int else Real
    # A check against an abstract class takes ten times the time.
    if type(value) is not kind and (not isinstance(value, wanted) or isinstance(value, bool)):
        raise TypeError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}")
    try:
        return kind(value)
    except OverflowError:
        raise ValueError(f"{name} is out of range: {value!r:.40}") from None


def _as_token_ids(name: str, ids: Any) -> list[int]:
    if not isinstance(ids, (list, tuple, set)) or any(
        not isinstance(i, Integral) or isinstance(i, bool) for i in ids
    ):
        raise TypeError(f"{name} must be a list of token ids, got {ids!r:.80}")
    return [int(i) for i in ids]
