"""Outputs: what generate, stream and step return. Fields carry vLLM's names. frontend/requests.py
makes them from sequences; users read them."""

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar, overload

import numpy as np


@dataclass(slots=True)
class Logprob:
    """A token's log-probability, its rank (how many tokens are at least as likely, 1 for the most
    likely), and its text (None without a tokenizer)."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(frozen=True, slots=True)
class LogprobLines:
    """Log-probabilities of tokens by the model's own logits, a line for each token.

    Attributes:
        data: [n, 1 + 2 * width] int32: the token's rank, then `width` pairs of a token id and the
            bits of its float32 log-probability: the token itself, then the most likely tokens in
            descending order. The width serves the request of the batch with the largest number;
            other requests read the beginning of their lines.
    """

    data: np.ndarray

    @property
    def token_ids(self) -> np.ndarray:
        return self.data[:, 1::2]

    @property
    def logprobs(self) -> np.ndarray:
        return self.data[:, 2::2].view(np.float32)

    @property
    def ranks(self) -> np.ndarray:
        return self.data[:, 0]


Line = TypeVar("Line", bound=dict[int, Logprob] | None)


class Lines(Sequence[Line]):
    """A list that makes its elements when they are read. As lists do, it equals a list of equal
    elements, and `+` joins two of them to a list."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list | Lines):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Any) -> Any:
        return [*self, *other] if isinstance(other, list | Lines) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return [*other, *self] if isinstance(other, list | Lines) else NotImplemented

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> Any:  # as a list: a tokenizer stays where it is
        return list, (list(self),)


class SampleLogprobs(Lines[dict[int, Logprob]]):
    """Log-probabilities of generated (or prompt) tokens: for each token a dict of token id ->
    Logprob, the token itself first, then the most likely tokens. They lie in arrays; a dict is made
    when it is read.

    Args:
        num_top: number of most likely tokens for each generated token.
        decode: makes a text from token ids.

    Attributes:
        data: lines as in LogprobLines, `size` numbers for each token.
    """

    def __init__(self, num_top: int, decode: Callable[[list[int]], str] | None = None):
        self.size = 1 + 2 * (1 + num_top)
        self.decode = decode
        self.data = array("i")

    def extend(self, lines: np.ndarray) -> None:
        """Append lines of LogprobLines. With a small vocabulary they are narrower than `size`."""
        self.size = min(self.size, lines.shape[1])
        self.data.frombytes(lines[:, : self.size].tobytes())

    def copy(self, decode: Callable[[list[int]], str] | None) -> "SampleLogprobs":
        """A copy of the current lines that reads texts with `decode`."""
        result = SampleLogprobs(self.width - 1, decode)
        result.data = self.data[:]
        return result

    @property
    def width(self) -> int:
        """Number of tokens in a line."""
        return self.size // 2

    @property
    def lines(self) -> LogprobLines:
        """The current lines."""
        return LogprobLines(np.array(self.data, np.int32).reshape(-1, self.size))

    @property
    def cumulative(self) -> float:
        """The sum over the generated tokens."""
        return math.fsum(array("f", self.data[2 :: self.size].tobytes()))

    def __len__(self) -> int:
        return len(self.data) // self.size

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Logprob]]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        width, first = self.width, range(len(self))[index] * self.size
        line = struct.unpack_from("i" + "if" * width, self.data, first * self.data.itemsize)
        ranks = (line[0], *range(1, width))
        # A generated token among the most likely tokens keeps its place, and takes its rank there.
        return {
            token_id: Logprob(logprob, rank, self.decode([token_id]) if self.decode else None)
            for token_id, logprob, rank in zip(line[1::2], line[2::2], ranks, strict=True)
        }

    def flat(self, start: int = 0) -> "FlatLogprobs":
        """The lines from `start` on, each number in a list of its own."""
        lines = LogprobLines(self.lines.data[start:])
        token_ids, num_lines = lines.token_ids, len(lines.data)
        ranks = np.empty_like(token_ids)
        ranks[:, 0], ranks[:, 1:] = lines.ranks, range(1, self.width)
        dicts = [self[start + i] for i in range(num_lines)] if self.decode else []
        texts: list[str | None] = [None] * token_ids.size
        if dicts:
            pairs = zip(dicts, token_ids.tolist(), strict=True)
            texts = [line[token].decoded_token for line, tokens in pairs for token in tokens]
        ends = range(self.width, token_ids.size + 1, self.width)
        return FlatLogprobs(
            [end - self.width for end in ends], [*ends][:num_lines], token_ids.ravel().tolist(),
            lines.logprobs.ravel().tolist(), ranks.ravel().tolist(), texts,
        )  # fmt: skip


class PromptLogprobs(Lines[dict[int, Logprob] | None]):
    """Log-probabilities of a prompt's tokens: None for the first token, then a line for each."""

    def __init__(self, lines: SampleLogprobs):
        self.lines = lines

    def __len__(self) -> int:
        return 1 + len(self.lines)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob] | None: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[int, Logprob] | None]: ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.lines[index - 1] if index else None

    def flat(self) -> "FlatLogprobs":
        return FlatLogprobs([0], [0]) + self.lines.flat()


@dataclass(eq=False, repr=False)
class FlatLogprobs(Lines[dict[int, Logprob]]):
    """Log-probabilities with flat_logprobs=True, vLLM's class: the numbers of all tokens in one
    list each. As a sequence it has a dict for each token; a prompt's first one is empty.

    Attributes:
        start_indices, end_indices: for each generated (or prompt) token the range of its entries:
            the token itself, then the most likely tokens.
        token_ids, logprobs, ranks, decoded_tokens: the entries.
    """

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ranks: list[int | None] = field(default_factory=list)
    decoded_tokens: list[str | None] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)

    @overload
    def __getitem__(self, index: int) -> dict[int, Logprob]: ...
    @overload
    def __getitem__(self, index: slice) -> "FlatLogprobs": ...
    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            ranges = list(zip(self.start_indices[index], self.end_indices[index], strict=True))
            ends = list(accumulate(end - start for start, end in ranges))
            chosen = [i for start, end in ranges for i in range(start, end)]
            return FlatLogprobs(
                [0, *ends][: len(ends)],
                ends,
                [self.token_ids[i] for i in chosen],
                [self.logprobs[i] for i in chosen],
                [self.ranks[i] for i in chosen],
                [self.decoded_tokens[i] for i in chosen],
            )
        entries = range(self.start_indices[index], self.end_indices[index])
        # As in SampleLogprobs: the last entry of a token counts, in the place of the first.
        return {
            self.token_ids[i]: Logprob(self.logprobs[i], self.ranks[i], self.decoded_tokens[i])
            for i in entries
        }

    def __add__(self, other: Any) -> Any:
        if not isinstance(other, FlatLogprobs):
            return super().__add__(other)
        shift = len(self.token_ids)
        return FlatLogprobs(
            self.start_indices + [start + shift for start in other.start_indices],
            self.end_indices + [end + shift for end in other.end_indices],
            self.token_ids + other.token_ids,
            self.logprobs + other.logprobs,
            self.ranks + other.ranks,
            self.decoded_tokens + other.decoded_tokens,
        )

    def __reduce__(self) -> Any:
        return FlatLogprobs, tuple(vars(self).values())


@dataclass
class Loglikelihood:
    """Log-probabilities of given tokens, each after the tokens before it.

    Attributes:
        token_ids: the tokens.
        logprobs: their log-probabilities.
        is_greedy: whether greedy decoding gives these tokens.
    """

    token_ids: list[int]
    logprobs: list[float]
    is_greedy: bool

    @property
    def total(self) -> float:
        """The log-probability of all tokens together, in nats."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        return math.exp(-self.total / len(self.logprobs))


@dataclass
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: the number of the sample in its request.
        text: the generated text so far (with RequestOutputKind.DELTA the new part, as in
            token_ids); while the sequence runs, without an end that may begin a stop string.
        token_ids: the generated tokens, with the EOS or stop token that ended them.
        cumulative_logprob: the sum of the generated tokens' log-probabilities.
        logprobs: for each generated token a dict of token id -> Logprob. Both are None without
            SamplingParams.logprobs.
        finish_reason: "stop" (EOS, a stop token or a stop string), "length" (max_tokens or
            max_model_len), "error" (`error` says why), "abort" (of streams and AsyncLLM: other
            aborted requests have no output), None while it runs.
        stop_reason: the member of stop_token_ids, or the stop string, that ended it; None after
            "length" or the tokenizer's EOS. Another EOS of generation_config is named, as in vLLM.
        routed_experts, lora_request: vLLM's, always None.
        error: what has ended it after the finish_reason "error": an error of its logits processors
            or its grammar, or of the two steps that failed while it ran; else None. vLLM has none.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[dict[int, Logprob]] | None = None
    routed_experts: None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    lora_request: None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times in seconds on time.monotonic's clock; None: not reached yet. The first token of a
    request with several samples is the first of any sample, its end the end of the last sample.

    Attributes:
        scheduled_time: when its first chunk was scheduled.
        last_token_time: of the newest token of any sample.
        num_generation_tokens: of all samples.
    """

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    scheduled_time: float | None = None
    last_token_time: float | None = None
    num_generation_tokens: int = 0

    # vLLM's names, and its 0.0 for what was not reached yet.

    @property
    def queued_ts(self) -> float:
        return self.arrival_time

    @property
    def scheduled_ts(self) -> float:
        return self.scheduled_time or 0.0

    @property
    def first_token_ts(self) -> float:
        return self.first_token_time or 0.0

    @property
    def last_token_ts(self) -> float:
        return self.last_token_time or 0.0

    @property
    def first_token_latency(self) -> float:
        """From the arrival to the first token."""
        return self.first_token_time - self.arrival_time if self.first_token_time else 0.0


class TokenIds:
    """A field that is a list of token ids. An array that is assigned becomes a list when the field
    is read: the prompts of a batch may have millions of tokens, few scripts read them, and each
    garbage collection would visit every element of a list."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = f"_{name}"

    def __get__(self, output: Any, owner: type) -> list[int]:
        if output is None:
            raise AttributeError("it has no default")
        token_ids = getattr(output, self.name)
        if isinstance(token_ids, array):
            token_ids = token_ids.tolist()
            setattr(output, self.name, token_ids)
        return token_ids

    def __set__(self, output: Any, token_ids: "list[int] | array[int]") -> None:
        setattr(output, self.name, token_ids)


@dataclass
class RequestOutput:
    """The answer to one request; `out["text"]` and `out["token_ids"]` read its first completion, as
    in nano-vllm.

    Attributes:
        request_id: the id that add_request returned.
        prompt: the prompt's text, None if it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        prompt_logprobs: for each token of the prompt a dict of token id -> Logprob, None for the
            first token; None without SamplingParams.prompt_logprobs. With RequestOutputKind.DELTA
            the first output has them, and later outputs an empty list.
        outputs: a completion for each sample, in order of index; with RequestOutputKind.DELTA only
            the samples with new tokens.
        finished: whether all samples have ended.
        metrics: RequestMetrics.
        lora_request, encoder_prompt, encoder_prompt_token_ids: vLLM's, always None.
        num_cached_tokens: prefix hits of the first sample, in tokens. (The other samples hit its
            blocks as well.)
        index: in LLM.stream, the number of the prompt.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: TokenIds = TokenIds()
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None  # type: ignore[misc]
    outputs: list[CompletionOutput]  # type: ignore[misc]
    finished: bool  # type: ignore[misc]
    metrics: RequestMetrics | None = None
    lora_request: None = None
    encoder_prompt: None = None
    encoder_prompt_token_ids: None = None
    num_cached_tokens: int | None = None
    index: int = field(default=0, kw_only=True)

    def add(self, later: "RequestOutput", aggregate: bool) -> None:
        """Take over a later output of the same request.

        Args:
            aggregate: both outputs are increments, and are joined; else the later one replaces
                this one's completions.
        """
        self.finished, self.metrics = later.finished, later.metrics
        self.num_cached_tokens = later.num_cached_tokens
        mine = {completion.index: completion for completion in self.outputs}
        for new in later.outputs:
            old = mine.get(new.index)
            if aggregate and old is not None:
                new.text = old.text + new.text
                new.token_ids = [*old.token_ids, *new.token_ids]
                if old.logprobs is not None and new.logprobs is not None:
                    new.logprobs = old.logprobs + new.logprobs  # type: ignore[operator]
            mine[new.index] = new
        self.outputs = [mine[index] for index in sorted(mine)]

    @property
    def error(self) -> str | None:
        """What has ended the request after the finish_reason "error"; else None."""
        return next((completion.error for completion in self.outputs if completion.error), None)

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}: a RequestOutput answers 'text' and 'token_ids'")
        return getattr(self.outputs[0], key)
