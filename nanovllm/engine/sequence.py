"""One sample of a request: its state in the engine.

The frontend makes it, the engine appends its tokens, scheduler and block manager move it.
"""

from array import array
from collections.abc import Callable, Iterable
from typing import NamedTuple

from nanovllm.core.step import Scoring
from nanovllm.outputs import RequestMetrics, SampleLogprobs
from nanovllm.sampling_params import SamplingParams

# Prompt tokens that are decoded before the first output token, so that its space is kept.
NUM_CONTEXT_TOKENS = 5


def shown(error: BaseException, show: Callable[[BaseException], str] = repr) -> str:
    """An error in words. It may be of a user's class, which can fail at that too."""
    try:
        return show(error) or repr(error)
    except Exception:
        return type(error).__name__


class TextState(NamedTuple):
    """How far the detokenizer came: the text of the tokens before `read`. The tokens from `prefix`
    on are decoded again as the context of the next ones. No stop string ends before `searched`.

    It is replaced as a whole, so that an interrupt finds it consistent."""

    prefix: int
    read: int
    text: str = ""
    searched: int = 0


class Sequence:
    """A sequence runs while it has tokens that are not computed: prefill, decode, prefix hits and
    the resumption after a preemption differ only in how many. How many are computed changes in
    every step, so the scheduler keeps that number, in a column over all rows.

    Attributes:
        token_ids: known tokens, prompt first, 32 bits each. The array can't grow while a numpy view
            of it lives, so what is handed on is a copy.
        row: of the scheduler's columns and the worker's state while it runs, else -1.
        prefill_end: the first position whose token comes from the worker's row; the chunks before
            it are known tokens.
        max_len: prompt and generated tokens at most.
        priority: the lowest runs first, under the Priority policy.
        caller: callers take turns, under the RoundRobin policy.
        index: which sample of its request it is.
        siblings: all samples of its request; empty where it is the only one.
        metrics: of the request, shared by its samples.
        delivered: how many of its output tokens, and characters of its text, were handed out as
            increments.
        stops: tokens that end it.
        check_from: from this number of tokens on every token may end it: at max_len, or earlier
            where its text is searched for stop strings.
        failed_at: how many tokens were known when a step failed in which it ran; 0: none did.
        logprobs: of its generated tokens, if the request wants them.
        targets: known tokens whose log-probabilities the request wants, one after another; they may
            go one token beyond the prompt.
        score_from: the position of the first target.
        scores: of the targets, as far as they were read; None: there are no targets.
        error: why its next token could not be sampled, which ended it.
        block_tables: for each group of layers its blocks, in order of position; -1 for a block that
            is freed as it lies outside the group's window. Empty while it does not run.
        prefix: the block manager's number of the prefix that its registered blocks hold.
        num_registered: how many of its blocks were registered in the prefix cache.
    """

    __slots__ = (
        "block_tables",
        "caller",
        "check_from",
        "delivered",
        "eos_token_ids",
        "error",
        "failed_at",
        "finish_reason",
        "index",
        "logprobs",
        "max_len",
        "metrics",
        "num_cached_tokens",
        "num_prompt_tokens",
        "num_registered",
        "params",
        "prefill_end",
        "prefix",
        "priority",
        "prompt",
        "request_id",
        "row",
        "score_from",
        "scores",
        "seed",
        "siblings",
        "stop_reason",
        "stop_token_ids",
        "stops",
        "targets",
        "text",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        token_ids: "array[int]",
        params: SamplingParams,
        *,
        seed: int,
        max_model_len: int,
        eos_token_ids: tuple[int, ...] = (),
        prompt: str | None = None,
        arrival_time: float = 0.0,
        targets: Iterable[int] | None = None,
        score_from: int = 1,
        priority: int = 0,
        caller: str | int = 0,
    ):
        """The array of its prompt becomes its own. With params.prompt_logprobs it scores `targets`,
        or the prompt from its second token on."""
        self.request_id = request_id
        self.prompt = prompt
        self.token_ids = token_ids
        self.num_prompt_tokens = len(self.token_ids)
        self.params = params
        self.seed = seed
        self.eos_token_ids = eos_token_ids
        self.stop_token_ids = tuple(params.stop_token_ids or ())
        self.stops = {*(() if params.ignore_eos else eos_token_ids), *self.stop_token_ids}
        self.max_len = max_model_len
        if params.max_tokens is not None:
            self.max_len = min(max_model_len, self.num_prompt_tokens + params.max_tokens)
        self.check_from = self.max_len
        if params.stop:
            self.check_from = min(self.max_len, self.num_prompt_tokens + params.min_tokens)
        self.logprobs = None if params.logprobs is None else SampleLogprobs(params.logprobs)
        self.priority, self.caller = priority, caller
        self.index = 0
        self.siblings: list[Sequence] = []
        self.scores: SampleLogprobs | None = None
        if params.prompt_logprobs is not None:
            self.scores = SampleLogprobs(params.prompt_logprobs)
            self.targets = array("I", self.token_ids[1:] if targets is None else targets)
            self.score_from = score_from
        self.metrics = RequestMetrics(arrival_time)
        self.num_cached_tokens: int | None = None  # of the prompt, at the first admission
        self.failed_at = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None
        self.text = TextState(
            max(0, self.num_prompt_tokens - NUM_CONTEXT_TOKENS), self.num_prompt_tokens
        )
        self.delivered = (0, 0)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the tokens: what it held in the cache and on the worker is gone."""
        self.row = -1
        self.block_tables: list[array[int]] = []
        self.prefill_end = self.num_registered = self.prefix = 0

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def samples(self) -> "list[Sequence]":
        """All samples of its request."""
        return self.siblings or [self]

    @property
    def request_finished(self) -> bool:
        # The last sample is likely to end last: of thousands, few are looked at.
        return all(seq.finished for seq in reversed(self.samples))

    @property
    def has_undelivered(self) -> bool:
        return len(self.token_ids) - self.num_prompt_tokens > self.delivered[0]

    @property
    def may_stop(self) -> bool:
        """Whether it may end before max_len."""
        return bool(self.stops or self.params.stop)

    @staticmethod
    def join(samples: "list[Sequence]") -> None:
        """Make sequences the samples of one request."""
        if len(samples) > 1:
            for index, seq in enumerate(samples):
                seq.index, seq.siblings, seq.metrics = index, samples, samples[0].metrics

    @property
    def num_cacheable(self) -> int:
        """How many of its first tokens may be prefix hits: the tokens behind them give
        log-probabilities that are still to come."""
        if self.params.skip_reading_prefix_cache:
            return 0
        if self.scores is None or len(self.scores) == len(self.targets):
            return len(self.token_ids)
        return self.score_from + len(self.scores) - 1

    def scoring(self, chunk: int, start: int, end: int) -> Scoring:
        """What to score with a chunk of its tokens, [start, end): the tokens after them, as far as
        they are targets and were not read before a preemption; perhaps none."""
        assert self.scores is not None
        first = max(start + 1, self.score_from + len(self.scores))
        token_ids = self.targets[first - self.score_from : max(0, end + 1 - self.score_from)]
        return Scoring(chunk, first - 1 - start, token_ids, self.scores.width - 1)

    def check_stop(self) -> None:
        """Set finish_reason if the last token ends the sequence."""
        token = self.token_ids[-1]
        if token in self.stops:
            self.finish_reason = "stop"
            # As in vLLM all but the first count as stop_token_ids here.
            if self.params.ignore_eos or (token,) != self.eos_token_ids[:1]:
                self.stop_reason = token
        elif len(self.token_ids) >= self.max_len:
            self.finish_reason = "length"
