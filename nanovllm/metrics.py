"""What the engine counts as it goes. The scheduler measures each step, the engine adds them up;
progress bars, benchmarks, watchers and tests read."""

import time
from dataclasses import dataclass, field, fields


@dataclass
class Counts:
    """What can be counted for a step and summed over steps.

    Attributes:
        prefill_tokens: prompt tokens computed (and tokens computed again after a preemption).
        decode_tokens: tokens computed one at a time for running sequences.
        cached_tokens: tokens that were not computed because the prefix cache had them.
        preemptions: sequences put back to make room for older ones.
        page_slots: places for tokens in the pages that sequences hold, a shared page counted once.
        empty_slots: those of them that hold no token.
    """

    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    page_slots: int = 0
    empty_slots: int = 0


@dataclass
class StepMetrics(Counts):
    """One step.

    Attributes:
        running: sequences that hold pages.
        waiting: sequences that hold none.
        stopped_by: why no more tokens joined the batch: "max_num_batched_tokens"; "max_num_seqs";
            "pages", too few are free; "preemption", those just freed are for older sequences; or
            "", there were none.
    """

    running: int = 0
    waiting: int = 0
    stopped_by: str = ""


@dataclass
class EngineMetrics(Counts):
    """Sums since the engine was made.

    Attributes:
        steps: steps submitted.
        last_step: the newest of them.
    """

    steps: int = 0
    last_step: StepMetrics = field(default_factory=StepMetrics)

    @property
    def kv_cache_waste(self) -> float:
        """The share of the slots in allocated pages that held no token, over all steps."""
        return self.empty_slots / self.page_slots if self.page_slots else 0.0

    def add(self, step: StepMetrics) -> None:
        for count in fields(Counts):
            setattr(self, count.name, getattr(self, count.name) + getattr(step, count.name))
        self.steps += 1
        self.last_step = step


class Laps:
    """Where the time goes: to whatever ends, since the one before it ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
