"""All that crosses from the engine to the worker and back, and the protocol it crosses by.

The worker keeps a row of state for each running sequence: its block table, its last sampled token,
its sampling parameters. A StepInput carries only what changes, so a step of plain decodes is three
arrays: row numbers, positions, new pages. It can go to another process.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nanovllm.outputs import LogprobLines
from nanovllm.sampling_params import SamplingParams


def _no_rows() -> np.ndarray:
    return np.empty(0, np.int64)


def _no_blocks() -> np.ndarray:
    return np.empty((1, 0), np.int32)


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
        min_len: prompt length plus min_tokens; 0 without min_tokens.
        block_tables: for each group of layers the blocks of all its known tokens, [blocks] int32.
        num_prompt_tokens: the tokens from there on are generated ones.
        token_ids: all its known tokens, if params.needs_history.
    """

    row: int
    num_cached_tokens: int
    params: SamplingParams
    seed: int
    stop_token_ids: tuple[int, ...]
    min_len: int
    block_tables: tuple[np.ndarray, ...] = (np.empty(0, np.int32),)
    num_prompt_tokens: int = 0
    token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """Known tokens that a sequence computes.

    Attributes:
        row: its row.
        position: of the first token.
        token_ids: the tokens.
        samples: whether they are its last known ones, so that the next one is sampled.
    """

    row: int
    position: int
    token_ids: Sequence[int]
    samples: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """Known tokens of a sequence whose log-probabilities are wanted, as far as a chunk gives them.

    Attributes:
        chunk: which of the step's chunks.
        offset: of the chunk's token that stands before the first of them.
        token_ids: the tokens, one after another; the last may be the one after the chunk.
        num_top: for so many most likely tokens beside.
    """

    chunk: int
    offset: int
    token_ids: Sequence[int]
    num_top: int


@dataclass(slots=True)
class StepInput:
    """One step: decodes first, then chunks.

    Attributes:
        starts: rows that begin a new sequence with this step.
        decode_rows: [decodes] int64. Each feeds the token last sampled for it, which only the
            worker knows, and samples the next one.
        decode_positions: [decodes] int64, of the tokens that are fed.
        decode_blocks: [groups, decodes] int32, the block that each decode opens in each group of
            layers; -1: its last block has room. Chunks open none: a row starts with the blocks of
            all its known tokens.
        chunks: all others.
        scorings: what is asked of chunks beside.
    """

    starts: list[RowStart] = field(default_factory=list)
    decode_rows: np.ndarray = field(default_factory=_no_rows)
    decode_positions: np.ndarray = field(default_factory=_no_rows)
    decode_blocks: np.ndarray = field(default_factory=_no_blocks)
    chunks: list[Chunk] = field(default_factory=list)
    scorings: list[Scoring] = field(default_factory=list)

    # Columns over all sequences of the step, decodes first.

    @property
    def num_decodes(self) -> int:
        return len(self.decode_rows)

    @property
    def rows(self) -> np.ndarray:
        return self._column(self.decode_rows, [chunk.row for chunk in self.chunks])

    @property
    def positions(self) -> np.ndarray:
        """Of each sequence's first query token."""
        return self._column(self.decode_positions, [chunk.position for chunk in self.chunks])

    @property
    def query_lens(self) -> np.ndarray:
        ones = np.ones(self.num_decodes, np.int64)
        return self._column(ones, [len(chunk.token_ids) for chunk in self.chunks])

    @property
    def samples(self) -> np.ndarray:
        """Whether the token after a sequence's last query token is sampled."""
        trues = np.ones(self.num_decodes, bool)
        return self._column(trues, [chunk.samples for chunk in self.chunks])

    # Of its query tokens.

    @property
    def sampled_tokens(self) -> np.ndarray:
        """Which of them one is sampled after."""
        return (self.query_lens.cumsum() - 1)[self.samples]

    @property
    def known_tokens(self) -> np.ndarray:
        """Those of the chunks."""
        return np.concatenate([np.empty(0, np.int64), *(chunk.token_ids for chunk in self.chunks)])

    def _column(self, decodes: np.ndarray, chunks: list) -> np.ndarray:
        return np.concatenate((decodes, np.array(chunks, decodes.dtype))) if chunks else decodes


@dataclass(frozen=True, slots=True)
class StepOutput:
    """The sampled tokens of a step: those of the decodes, then those of the chunks that sample; and
    the log-probabilities of those whose sequences ask, in their order, and of the tokens of the
    step's scorings. Those at the places in `errors` could not be drawn."""

    token_ids: list[int]
    logprobs: LogprobLines | None = None
    scores: LogprobLines | None = None
    errors: dict[int, Exception] = field(default_factory=dict)


class PendingStep(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step to end, then its output."""
        ...


class Executor(Protocol):
    """Runs steps strictly in the order of submission."""

    def submit(self, step: StepInput) -> PendingStep: ...

    @property
    def sleeping(self) -> Collection[str]:
        """Which of "weights" and "kv_cache" have no memory now."""
        ...

    def sleep(self, level: int) -> None:
        """Give back the memory of both, when no step will be read any more. At level 1 weights are
        kept in the CPU's memory."""
        ...

    def wake_up(self, tags: Collection[str]) -> None:
        """Undo that for some; the cache is empty. Raises RuntimeError if memory is too small; then
        both sleep."""
        ...

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with each worker's model."""
        ...

    def is_usable(self) -> bool:
        """Whether steps can run after one has failed."""
        ...

    def close(self) -> None:
        """Give everything back; no step follows."""
        ...
