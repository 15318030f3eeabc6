"""What generate and step give back. Fields carry vLLM's names."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: which of the request's samples this is.
        text: the generated text so far (of RequestOutputKind.DELTA only what is new, as for
            token_ids); while it runs, without an end that may be the beginning of
            a stop string.
        token_ids: the generated tokens, with the EOS or stop token that ended them.
        cumulative_logprob, logprobs: None (log-probabilities were not asked for).
        finish_reason: "stop" (EOS, a stop token or a stop string), "length" (max_tokens or
            max_model_len), None while it runs.
        stop_reason: the member of stop_token_ids, or the stop string, that ended it; None after EOS
            or "length".
    """

    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None = None
    logprobs: Any = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestMetrics:
    """Seconds on time.monotonic's clock; None: not reached yet."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass
class RequestOutput:
    """The answer to one request; `out["text"]` and `out["token_ids"]` read its first completion, as
    in nano-vllm.

    Attributes:
        request_id: the id that add_request returned.
        prompt: the prompt's text, None if it was given as token ids.
        prompt_token_ids: the prompt's tokens.
        prompt_logprobs: None (not asked for).
        outputs: the completions.
        finished: whether all of them have ended.
        metrics: when it arrived, had its first token, and ended.
        num_cached_tokens: prompt tokens whose keys and values were found in the prefix cache.
        index: of LLM.stream, which of its prompts this is of.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: Any
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int
    index: int = 0

    def __getitem__(self, key: str) -> Any:
        if key not in ("text", "token_ids"):
            raise KeyError(f"{key!r}: a RequestOutput answers 'text' and 'token_ids'")
        return getattr(self.outputs[0], key)
