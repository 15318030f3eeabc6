"""What crosses between the engine and the worker: a step, its output, and the Executor protocol.

The engine makes StepInputs and reads StepOutputs; worker/executor.py implements the protocol. The
worker keeps a row of state for each running sequence (block tables, last sampled token, sampling
parameters), so a StepInput carries only what changes. All of it can be pickled.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nanovllm.outputs import LogprobLines
from nanovllm.sampling_params import SamplingParams

NO_WAY_ON = "NoExtension"  # llguidance's error where a grammar can neither go on nor end


def _no_rows() -> np.ndarray:
    return np.empty(0, np.int64)


def _no_blocks() -> np.ndarray:
    return np.empty((1, 0), np.int32)


@dataclass(frozen=True, slots=True)
class RowStart:
    """A sequence takes over a row: it was admitted, or it resumes after a preemption.

    Attributes:
        row: the row, in [0, max_num_seqs).
        num_cached_tokens: positions below it lie in blocks of other sequences; their keys and
            values are never stored again.
        params: the request's sampling parameters.
        seed: 64 bits; with the position they determine the sampling noise.
        stop_token_ids: tokens that may not be sampled at positions below min_len.
        min_len: prompt length plus min_tokens; 0 without min_tokens.
        block_tables: for each group of layers the blocks of all known tokens, [blocks] int32.
        num_prompt_tokens: tokens from this position on are generated ones.
        token_ids: all known tokens, if params.needs_history.
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
        row: the sequence's row.
        position: of the first token.
        token_ids: the tokens.
        samples: whether the last token is the sequence's last known one, so that the next one is
            sampled.
    """

    row: int
    position: int
    token_ids: Sequence[int]
    samples: bool


@dataclass(frozen=True, slots=True)
class Scoring:
    """Known tokens of a sequence whose log-probabilities a chunk gives.

    Attributes:
        chunk: index of the chunk in the step.
        offset: index, in the chunk, of the token before the first scored one.
        token_ids: the scored tokens, one after another; the last may be the one after the chunk.
        num_top: how many of the most likely tokens come with each.
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
        decode_rows: [decodes] int64. Each decode feeds the row's last sampled token, which only
            the worker knows, and samples the next one.
        decode_positions: [decodes] int64, of the tokens that are fed.
        decode_blocks: [groups, decodes] int32, the block that each decode opens in each group of
            layers; -1: its last block has room. Chunks open none: a row starts with the blocks of
            all its known tokens.
        chunks: prompts, or parts of them.
        scorings: known tokens of the chunks whose log-probabilities are wanted.
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

    def _column(self, decodes: np.ndarray, chunks: list) -> np.ndarray:
        return np.concatenate((decodes, np.array(chunks, decodes.dtype))) if chunks else decodes


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What a step gives, in the order of its sampled sequences: decodes, then chunks that sample.

    Attributes:
        token_ids: the sampled tokens.
        logprobs: log-probabilities of the sampled tokens of the sequences that want them.
        scores: log-probabilities of the step's scorings.
        errors: by index in token_ids, why a token could not be sampled.
    """

    token_ids: list[int]
    logprobs: LogprobLines | None = None
    scores: LogprobLines | None = None
    errors: dict[int, BaseException] = field(default_factory=dict)


class PendingStep(Protocol):
    def result(self) -> StepOutput:
        """Wait for the step to end, then its output. Read before the fourth step after it is
        submitted: its memory is used again."""
        ...


@dataclass(frozen=True)
class CacheGroup:
    """The KV cache of a group of layers, which have one block table.

    Attributes:
        num_blocks: its blocks; enough for the longest sequence.
        block_size: tokens per block; the same in all groups.
        window: tokens that a query token sees, itself included; None: all.
    """

    num_blocks: int
    block_size: int
    window: int | None = None


# How many steps more than with the whole budget in each a prompt may take, where steps are kept
# small for it (docs/decisions/0023).
MIXED_STEPS = 4


class Executor(Protocol):
    """What the engine knows of the worker. Steps run strictly in the order of submission.

    Attributes:
        groups: the KV cache, group by group.
    """

    groups: tuple[CacheGroup, ...]

    def submit(self, step: StepInput) -> PendingStep: ...

    def prompt_budget(self, num_decodes: int, waiting: Iterable[tuple[int, int]]) -> int:
        """How many prompt tokens may join num_decodes decodes in one step; without decodes, the
        whole token budget. At least 1 if a request waits and the token budget has room. No prompt
        takes more than MIXED_STEPS steps more than it would with the whole budget in each.

        Args:
            waiting: (tokens still to compute, tokens of the sequence), of the prompt that has
                begun and of the waiting sequences that have a row, next first. It is read only as
                far as it matters.
        """
        ...

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """The function's result for each worker's model. Raises RuntimeError if a sleep of level 2
        has dropped the weights."""
        ...

    @property
    def sleeping(self) -> Collection[str]:
        """Which of "weights" and "kv_cache" have no memory now."""
        ...

    def sleep(self, level: int) -> None:
        """Give back the memory of both, when no step will be read any more. Level 1 keeps weights
        in the CPU's memory."""
        ...

    def wake_up(self, tags: Collection[str]) -> None:
        """End the sleep of some; the cache is empty. Raises RuntimeError if memory is too small;
        then both sleep."""
        ...

    def is_usable(self) -> bool:
        """Whether steps can run after one has failed."""
        ...

    def close(self) -> None:
        """Give all memory back; no step follows."""
        ...
