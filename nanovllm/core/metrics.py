"""What the engine counts. The scheduler counts each step, the engine adds the steps up; progress
bars, benchmarks, the step watcher and LLM.get_metrics read the sums."""

import time
from bisect import bisect_left
from collections import Counter as Tally
from dataclasses import dataclass, field, fields
from itertools import accumulate

from nanovllm.outputs import RequestMetrics

# Upper limits of the histograms' buckets in seconds, vLLM's.
TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TO_THE_END = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
# Upper limits of numbers of tokens.
TOKENS = tuple(float(n * 10**power) for power in range(6) for n in (1, 2, 5))
# Histograms of requests that have ended and were not aborted, by vLLM's names: from when to when.
INTERVALS = {
    "vllm:e2e_request_latency_seconds": ("arrival_time", "finished_time"),
    "vllm:time_to_first_token_seconds": ("arrival_time", "first_token_time"),
    "vllm:request_queue_time_seconds": ("arrival_time", "scheduled_time"),
    "vllm:request_prefill_time_seconds": ("scheduled_time", "first_token_time"),
    "vllm:request_decode_time_seconds": ("first_token_time", "last_token_time"),
    "vllm:request_inference_time_seconds": ("scheduled_time", "last_token_time"),
}


@dataclass
class Counts:
    """Counts of a step that can be summed over steps.

    Attributes:
        prefill_tokens: prompt tokens computed (and tokens computed again after a preemption).
        decode_tokens: tokens computed by decodes.
        cached_tokens: tokens of prefix hits, which were not computed.
        preemptions: sequences that were preempted.
        block_slots: slots of the blocks that sequences hold, a shared block counted once.
        empty_slots: slots among them that hold no token.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    block_slots: int = 0
    empty_slots: int = 0


@dataclass
class StepMetrics(Counts):
    """One step.

    Attributes:
        running: sequences that hold blocks.
        waiting: sequences that hold none.
        stopped_by: why no more prompt tokens joined the batch: "max_num_batched_tokens", the token
            budget is used up; "prompt_budget", the executor keeps the step small; "max_num_seqs" or
            "blocks", too few rows or blocks are free; "preemption", the blocks just freed are for
            running sequences; or "", no sequence waits.
    """

    running: int = 0
    waiting: int = 0
    stopped_by: str = ""


@dataclass
class EngineMetrics(Counts):
    """Sums since the engine was made.

    Attributes:
        steps: steps submitted.
        last_step: the newest step.
        prompt_tokens: prompt tokens of requests that have ended and had a token.
        generation_tokens: generated tokens of requests that have ended.
        finish_reasons: finish reason -> number of requests.
        num_generated: tokens of requests that have ended.
        between_tokens: seconds from a token of a sequence to its next one.
        intervals: seconds, by the names of INTERVALS.
    """

    steps: int = 0
    last_step: StepMetrics = field(default_factory=StepMetrics)
    prompt_tokens: int = 0
    generation_tokens: int = 0
    finish_reasons: Tally[str] = field(default_factory=Tally)
    num_generated: "Observations" = field(default_factory=lambda: Observations(TOKENS))
    between_tokens: "Observations" = field(default_factory=lambda: Observations(BETWEEN_TOKENS))
    intervals: "dict[str, Observations]" = field(
        default_factory=lambda: {
            name: Observations(TO_FIRST_TOKEN if "to_first_token" in name else TO_THE_END)
            for name in INTERVALS
        }
    )

    @property
    def kv_cache_waste(self) -> float:
        """The share of the slots in held blocks that held no token, over all steps."""
        return self.empty_slots / self.block_slots if self.block_slots else 0.0

    def add(self, step: StepMetrics) -> None:
        for count in fields(Counts):
            setattr(self, count.name, getattr(self, count.name) + getattr(step, count.name))
        self.steps += 1
        self.last_step = step

    def add_request(
        self, num_prompt: int, num_generated: int, finish_reason: str, times: RequestMetrics
    ) -> None:
        """Count a request that has ended."""
        self.prompt_tokens += num_prompt if num_generated else 0
        self.generation_tokens += num_generated
        self.finish_reasons[finish_reason] += 1
        self.num_generated.add(num_generated)
        if finish_reason != "abort" and times.last_token_time is not None:
            for name, (start, end) in INTERVALS.items():
                self.intervals[name].add(getattr(times, end) - getattr(times, start))


class Observations:
    """A histogram of observed values.

    Args:
        limits: upper limits of the buckets, ascending; one more bucket has no limit.
    """

    def __init__(self, limits: tuple[float, ...]):
        self.limits = limits
        self.counts = [0] * (len(limits) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.limits, value)] += times
        self.sum += value * times

    @property
    def buckets(self) -> dict[str, int]:
        """Upper limit -> number of values up to it."""
        names = [*map(str, self.limits), "+Inf"]
        return dict(zip(names, accumulate(self.counts), strict=True))


# The results of LLM.get_metrics; vLLM's classes.


@dataclass
class Metric:
    name: str
    labels: dict[str, str]


@dataclass
class Counter(Metric):
    """A count that only grows."""

    value: int


@dataclass
class Vector(Metric):
    """Counts that only grow, in an order. There is none yet: vLLM has one for speculation."""

    values: list[int]


@dataclass
class Gauge(Metric):
    """A current value."""

    value: float


@dataclass
class Histogram(Metric):
    """Observed values: their number, their sum, and upper limit -> number of values up to it."""

    count: int
    sum: float
    buckets: dict[str, int]


class Laps:
    """Durations of consecutive phases: end(name) closes the phase that began with the last end."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
