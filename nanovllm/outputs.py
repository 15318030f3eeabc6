"""Outputs: what generate, stream and step return. Fields carry vLLM's names. frontend/requests.py
makes them from sequences; users read them."""

import math
import struct
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

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


class SampleLogprobs(Sequence[dict[int, Logprob]]):
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

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> Any:  # as a list: a tokenizer stays where it is
        return list, (list(self),)


class PromptLogprobs(Sequence[dict[int, Logprob] | None]):
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

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> Any:
        return list, (list(self),)


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
        error: what has ended it after the finish_reason "error": an error of its logits processors,
            its grammar or its text, options that leave no token to sample, or of the two steps that
            failed while it ran; else None. vLLM has none.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Sequence[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Times in seconds on time.monotonic's clock; None: not reached yet. The first token of a
    request with several samples is the first of any sample, its end the end of the last sample."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


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


@dataclass(kw_only=True)
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
        metrics: times of arrival, first token and end.
        num_cached_tokens: prefix hits of the first sample, in tokens. (The other samples hit its
            blocks as well.)
        index: in LLM.stream, the number of the prompt.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: TokenIds = TokenIds()
    prompt_logprobs: Sequence[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int
    index: int = 0

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
                    new.logprobs = [*old.logprobs, *new.logprobs]
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
