"""All that crosses from the engine to the worker and back, and the protocol it crosses by.

The worker keeps a row of state for each running sequence: its block table, its last sampled token,
its sampling parameters. A StepInput carries only what changes, so a step of plain decodes is a list
of row numbers. It is plain Python: it can go to another process.
"""

from dataclasses import dataclass, field
from typing import Protocol

from nanovllm.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence takes over a row: it was admitted, or it resumes after a preemption.

    Attributes:
        row: the row, in [0, max_num_seqs).
        num_cached_tokens: positions below it lie in pages that others share; they are never stored
            again.
        params: the request's sampling parameters.
        seed: 64 bits; with the position it determines the sampling noise.
        stop_token_ids: tokens that may not be drawn at positions below min_len.
        min_len: prompt length plus min_tokens.
    """

    row: int
    num_cached_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    min_len: int


@dataclass(slots=True)
class StepInput:
    """One step. `rows`, `positions`, `query_lens` and `samples` run over its sequences, the decodes
    first.

    Attributes:
        starts: rows that begin a new sequence with this step.
        new_pages: (row, first index in its block table, pages), for tables that grow with this
            step.
        rows: the row of each sequence that runs.
        positions: the position of its first query token.
        query_lens: its number of query tokens.
        samples: whether its last query token is its last token, so that the next one is sampled.
        num_decodes: the first so many sequences feed the token last sampled for their row, which
            only the worker knows.
        token_ids: the query tokens of all others, one sequence after another.
    """

    starts: list[RowStart] = field(default_factory=list)
    new_pages: list[tuple[int, int, list[int]]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    query_lens: list[int] = field(default_factory=list)
    samples: list[bool] = field(default_factory=list)
    num_decodes: int = 0
    token_ids: list[int] = field(default_factory=list)

    def add(self, row: int, position: int, query_len: int, samples: bool) -> None:
        self.rows.append(row)
        self.positions.append(position)
        self.query_lens.append(query_len)
        self.samples.append(samples)


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The sampled tokens of a step, one for each sequence that samples, in the step's order."""

    token_ids: list[int]


class PendingStep(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step to end, then its output."""
        ...


class Executor(Protocol):
    """Runs steps strictly in the order of submission."""

    def submit(self, step: StepInput) -> PendingStep: ...

    def close(self) -> None:
        """Give everything back; no step follows."""
        ...
