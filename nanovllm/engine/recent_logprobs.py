"""Log-probabilities on their way from steps to sequences: a step's lines go into columns over all
rows at once, and from there to each sequence many at a time.

The engine puts them in; the scheduler takes them out when a sequence leaves its row, the
engine's thread before the output of a running sequence is made.
"""

import numpy as np

from nanovllm.core.step import StepInput
from nanovllm.engine.sequence import Sequence
from nanovllm.outputs import LogprobLines

NUM_LINES = 64  # per row; they take 11 KB at most


class RecentLogprobs:
    """The lines of each row's last positions, that of position p at p % NUM_LINES. A sequence takes
    lines up to its last known token. So what a step sampled past an end, or before an exception,
    stays behind, and the row's next sequence writes over it.

    Args:
        num_rows: rows of the worker's state.

    Attributes:
        width: tokens of the widest line that a sequence has wanted.
        lines: [rows * NUM_LINES, as for LogprobLines], no wider than that.
    """

    def __init__(self, num_rows: int):
        self.width = 0
        self.lines = np.empty((num_rows * NUM_LINES, 0), np.int32)

    def put(self, step: StepInput, sampled: list[Sequence], new: LogprobLines) -> None:
        """Keep a step's lines, before its tokens are appended to the sequences that it sampled."""
        samples = step.samples
        rows, positions = step.rows[samples], (step.positions + step.query_lens)[samples]
        if len(new.data) < len(sampled):
            wanting = [i for i, seq in enumerate(sampled) if seq.logprobs is not None]
            sampled = [sampled[i] for i in wanting]
            rows, positions = rows[wanting], positions[wanting]
        places = positions % NUM_LINES
        for i in np.flatnonzero(places == 0).tolist():
            self.take(sampled[i])  # its lines will be written over from here on
        lines = new.data[:, : 1 + 2 * self.width]
        if missing := lines.shape[1] - self.lines.shape[1]:
            self.lines = np.pad(self.lines, ((0, 0), (0, missing)))
        self.lines[rows * NUM_LINES + places] = lines

    def take(self, seq: Sequence) -> None:
        """Hand a sequence the lines of its known tokens, if it wants any."""
        if seq.logprobs is None or seq.row < 0:
            return
        first = seq.num_prompt_tokens + len(seq.logprobs)
        start = seq.row * NUM_LINES + first % NUM_LINES
        num_lines = len(seq.token_ids) - first
        if num_lines:
            seq.logprobs.extend(self.lines[start : start + num_lines])
