"""SamplingParams: how one request's tokens are chosen and when it ends. Names, defaults and
meanings are vLLM's.

Users construct it; llm.py copies it on admission; the sampler and the stop checks read it.
"""

import math
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from typing import Any

_FLAGS = (
    "ignore_eos",
    "include_stop_str_in_output",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
MAX_LOGPROBS = 20  # vLLM's default of max_logprobs
LOGPROBS = ("logprobs", "prompt_logprobs")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
GREEDY_TEMPERATURE = 1e-5  # below this the softmax is one-hot in float32: treated as greedy


class RequestOutputKind(Enum):
    """What step() gives of a request after each of its tokens; generate waits for the end in any
    case."""

    CUMULATIVE = 0  # all so far
    DELTA = 1  # what is new
    FINAL_ONLY = 2  # nothing before it has ended


@dataclass(kw_only=True)
class SamplingParams:
    """Sampling parameters of a request.

    Args:
        temperature: divides the logits, in [0, 2]; 0 is greedy (the token of the highest logit).
        top_p: keeps the smallest set of most likely tokens whose probabilities reach top_p, in (0,
            1].
        top_k: keeps the top_k most likely tokens; 0 or -1 keeps all.
        min_p: drops tokens less likely than min_p times the most likely one, in [0, 1].
        max_tokens: tokens generated at most; None: up to max_model_len.
        min_tokens: no EOS or stop token is drawn, and no stop string ends the request, before
            this many tokens.
        ignore_eos: go on after an EOS token.
        stop_token_ids: tokens that end the request, besides EOS; the last one stays out of the
            text.
        stop: strings that end the request when its text comes to hold one of them; the text is cut
            before it.
        include_stop_str_in_output: the stop string, or the text of the token that stopped it,
            stays.
        detokenize: whether there is a text at all.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: handed to the tokenizer; fast ones don't look at it.
        output_kind: what step() gives of it.
        presence_penalty: subtracted from the logits of tokens that were generated before, in
            [-2, 2].
        frequency_penalty: the same, times how often they were.
        repetition_penalty: tokens of the prompt and the output: divides logits above 0, multiplies
            those below; above 0, 1 changes nothing.
        logit_bias: token id -> what is added to its logit.
        allowed_token_ids: no other tokens are drawn.
        bad_words: texts that are not generated: a token that would complete one is not drawn.
        logprobs: log-probabilities of each generated token and of so many most likely ones, in [0,
            20]; None: none at all.
        prompt_logprobs: the same for each token of the prompt but the first. Such a request
            computes all of its prompt, whatever the prefix cache has.
        seed: the same seed draws the same tokens whatever else is in the batch; None or -1: one of
            the engine's own.

    Raises:
        ValueError: a value is outside its range.
        TypeError: a value has the wrong type.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool = False
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    # Of bad_words; llm.py sets it, which has the tokenizer.
    bad_words_token_ids: list[list[int]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", *PENALTIES):
            setattr(self, name, _as_number(name, getattr(self, name), float))
        for name in ("top_k", "min_tokens"):
            setattr(self, name, _as_number(name, getattr(self, name), int))
        for name in LOGPROBS:
            if getattr(self, name) is True:  # as in vLLM
                setattr(self, name, 1)
        for name in ("max_tokens", *LOGPROBS, "seed"):
            if getattr(self, name) is not None:
                setattr(self, name, _as_number(name, getattr(self, name), int))
        for name in _FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be a bool, got {getattr(self, name)!r}")
        if not isinstance(self.output_kind, RequestOutputKind):
            raise TypeError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")
        if self.seed == -1:  # as in vLLM
            self.seed = None
        self._check_ranges()
        self._check_stop()
        self._check_logits()

    def _check_ranges(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must be in [0, 2] (0 is greedy), got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1] (1 keeps every token), got {self.top_p}")
        if self.top_k < -1:
            raise ValueError(
                f"top_k must be at least 1, or 0 or -1 to keep every token, got {self.top_k}"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1] (0 keeps every token), got {self.min_p}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(
                f"max_tokens must be at least 1, or None for no limit of its own, "
                f"got {self.max_tokens}"
            )
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens must be at least 0, got {self.min_tokens}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens={self.max_tokens}, got {self.min_tokens}"
            )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        if self.stop_token_ids is not None:
            self.stop_token_ids = _as_token_ids("stop_token_ids", self.stop_token_ids)

    def _check_logits(self) -> None:
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(
                    f"{name} must be in [-2, 2] (0 changes nothing), got {getattr(self, name)}"
                )
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(
                f"repetition_penalty must be above 0 and finite (1 changes nothing), "
                f"got {self.repetition_penalty}"
            )
        for name in LOGPROBS:
            number = getattr(self, name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise ValueError(
                    f"{name} must be in [0, {MAX_LOGPROBS}], or None for none, got {number}"
                )
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
        if self.bad_words is not None:
            words = self.bad_words
            if not isinstance(words, (list, tuple)) or not all(isinstance(w, str) for w in words):
                raise TypeError(f"bad_words must be a list of strings, got {words!r:.80}")
            if not all(words):
                raise ValueError(f"bad_words must not have an empty string, got {words!r:.80}")
            self.bad_words = list(dict.fromkeys(words))

    @property
    def penalizes(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def changes_logits(self) -> bool:
        """Whether its tokens are drawn from other logits than the model's."""
        return bool(
            self.penalizes or self.logit_bias or self.allowed_token_ids or self.bad_words_token_ids
        )

    @property
    def needs_history(self) -> bool:
        """Whether its logits depend on its tokens so far."""
        return self.penalizes or any(len(word) > 1 for word in self.bad_words_token_ids)

    def _check_stop(self) -> None:
        """A list, as in vLLM."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        stop = [] if stop is None else stop
        if not isinstance(stop, (list, tuple)) or any(not isinstance(s, str) for s in stop):
            raise TypeError(f"stop must be a string or a list of strings, got {self.stop!r}")
        if "" in stop:
            raise ValueError("stop cannot contain an empty string")
        if stop and not self.detokenize:
            raise ValueError("stop is searched for in the text: it needs detokenize=True")
        self.stop = list(stop)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE


def _as_number(name: str, value: Any, kind: type) -> int | float:
    """Python's own number for any kind of it (numpy's, say)."""
    wanted = Integral if kind is int else Real
    # A check against an abstract class takes ten times as long.
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
