"""All that the worker keeps of its rows, one for each running sequence, on the host and on the
device.

The runner has sequences start in them; inputs.py reads and writes their blocks, sampler.py,
logits.py, host_processors.py and logprobs.py read what their requests want.
"""

from typing import Any

import numpy as np
import torch

from nanovllm.core.step import RowStart
from nanovllm.ops.batch import RowState
from nanovllm.worker.host_processors import HostRow
from nanovllm.worker.logits import NO_TOKEN
from nanovllm.worker.record import StepRecord


class Rows:
    """The rows' state. A row that was never started takes the most likely tokens.

    Args:
        max_num_seqs: rows. There is one more, for the padding of CUDA graphs.
        num_groups: groups of layers.
        max_blocks: blocks of the longest sequence.
        vocab_size: of the logits.
        device: where steps run.

    Attributes:
        state: what the device has.
        block_tables: [groups, rows, blocks], the host's. (On a CPU host and device share memory.)
        num_cached_tokens: [rows], as in RowStart.
        limited: [rows] whether top_k, top_p or min_p limit its draws.
        wants_logprobs: [rows].
        changed: [rows] whether its logits are always changed before a draw.
        min_len: [rows]; below it the logits of stop tokens are changed.
        any_limited, any_logprobs, any_changed: whether a row as it was last started is one.
        num_prompt_tokens, presence, frequency, repetition: [rows] of the rows that are changed.
        allowed: of each row a bit for each token of the vocabulary.
        bad_words: one after another, each the last token first, NO_TOKEN behind it.
        history: tokens by position, prompt and output, of the rows that need them.
        on_host: by number the rows whose tokens the host has to see before the next draw.
        needs_host, has_grammar: [rows].
    """

    def __init__(
        self,
        max_num_seqs: int,
        num_groups: int,
        max_blocks: int,
        vocab_size: int,
        device: torch.device,
    ):
        self.padding_row, self.vocab_size, self.device = max_num_seqs, vocab_size, device
        num_rows = max_num_seqs + 1

        def column(fill: float, dtype: Any) -> np.ndarray:
            return np.full(num_rows, fill, dtype)

        def table(fill: float, dtype: Any = np.int32) -> RowTable:
            return RowTable(num_rows, fill, dtype, device)

        self.block_tables = np.zeros((num_groups, num_rows, max_blocks), np.int32)
        self.ints = np.stack((column(0, np.int64), column(vocab_size, np.int64)))  # seed, top_k
        # Temperature, top_p, min_p.
        self.floats = np.stack([column(fill, np.float32) for fill in (0, 1, 0)])
        self.on_device = [
            torch.from_numpy(array).to(device)
            for array in (self.block_tables, self.ints, self.floats)
        ]
        tables, ints, floats = self.on_device
        last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.state = RowState(tables, last_tokens, *ints, *floats)
        self.num_cached_tokens = column(0, np.int64)
        self.limited, self.wants_logprobs = column(False, bool), column(False, bool)
        self.changed, self.min_len = column(False, bool), column(0, np.int64)
        self.any_limited = self.any_logprobs = self.any_changed = False

        self.num_prompt_tokens = column(0, np.int64)
        self.presence, self.frequency = column(0, np.float32), column(0, np.float32)
        self.repetition = column(1, np.float32)
        self.allowed = table(fill=-1)  # all bits
        self.bad_words = table(fill=NO_TOKEN)
        self.stop_token_ids = table(fill=NO_TOKEN)
        self.bias_ids, self.bias = table(fill=0), table(fill=0, dtype=np.float32)
        self.history = table(fill=0)
        self.on_host: dict[int, HostRow] = {}
        self.needs_host, self.has_grammar = column(False, bool), column(False, bool)

    def start(self, starts: list[RowStart], record: StepRecord) -> None:
        """Sequences take over rows."""
        if not starts:
            return
        rows = np.array([start.row for start in starts])
        params = [start.params for start in starts]
        self.num_cached_tokens[rows] = [start.num_cached_tokens for start in starts]
        self.ints[0, rows] = np.array([start.seed for start in starts], np.uint64).view(np.int64)
        vocab = self.vocab_size
        self.ints[1, rows] = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
        temperatures = [0.0 if p.is_greedy else p.temperature for p in params]
        self.floats[:, rows] = temperatures, [p.top_p for p in params], [p.min_p for p in params]
        temperature, top_p, min_p = self.floats[:, rows]
        has_limit = (self.ints[1, rows] < vocab) | (top_p < 1) | (min_p > 0)
        self.limited[rows] = has_limit & (temperature > 0)
        self.wants_logprobs[rows] = [p.logprobs is not None for p in params]
        self.changed[rows] = [p.changes_logits for p in params]
        self.min_len[rows] = [_min_len(start) for start in starts]
        for start in starts:
            for of_group, blocks in zip(self.block_tables, start.block_tables, strict=True):
                of_group[start.row, : len(blocks)] = blocks
        if self.device.type != "cpu":
            num_blocks = max(len(blocks) for start in starts for blocks in start.block_tables)
            self._upload(rows, num_blocks, record)
        self.any_limited = bool(self.limited.any())
        self.any_logprobs = bool(self.wants_logprobs.any())
        self.any_changed = bool(self.changed.any() or self.min_len.any())
        if self.any_changed or self.on_host:
            self._start_changed(rows, starts, record)

    def changes(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether the logits of these rows are changed, for tokens at these positions."""
        return self.changed[rows] | (positions < self.min_len[rows])

    def _upload(self, rows: np.ndarray, num_blocks: int, record: StepRecord) -> None:
        """The device's part of rows that start. Behind num_blocks their tables keep the blocks of
        former sequences, which no kernel reads."""
        tables, ints, floats = self.on_device
        arrays = {"rows": rows, "ints": self.ints[:, rows], "floats": self.floats[:, rows]}
        new = record.upload({**arrays, "tables": self.block_tables[:, rows, :num_blocks]})
        index = new["rows"]
        ints[:, index], floats[:, index] = new["ints"], new["floats"]
        if num_blocks:
            tables[:, index, :num_blocks] = new["tables"]

    def _start_changed(self, rows: np.ndarray, starts: list[RowStart], record: StepRecord) -> None:
        """What logits.py and host_processors.py need of rows that start."""
        for start in starts:
            row, params = start.row, start.params
            self.needs_host[row] = params.needs_host
            self.has_grammar[row] = params.grammar is not None
            self.on_host.pop(row, None)
            if params.needs_host:
                self.on_host[row] = HostRow(start)
        changed = self.changed[rows] | (self.min_len[rows] > 0)
        if not changed.any():
            return
        rows, starts = rows[changed], [starts[i] for i in np.flatnonzero(changed)]
        self.num_prompt_tokens[rows] = [start.num_prompt_tokens for start in starts]
        self.presence[rows] = [start.params.presence_penalty for start in starts]
        self.frequency[rows] = [start.params.frequency_penalty for start in starts]
        self.repetition[rows] = [start.params.repetition_penalty for start in starts]
        biases = [start.params.logit_bias or {} for start in starts]
        histories = [s.token_ids if s.params.reads_history else () for s in starts]
        for table, values in (
            (self.allowed, [_allowed_bits(start, self.vocab_size) for start in starts]),
            (self.bad_words, [_bad_words(start) for start in starts]),
            (self.stop_token_ids, [start.stop_token_ids for start in starts]),
            (self.bias_ids, [list(bias) for bias in biases]),
            (self.bias, [list(bias.values()) for bias in biases]),
            (self.history, histories),
        ):
            table.start(rows, values, record)


class RowTable:
    """Numbers that rows bring, on the device, as wide as the widest so far; behind a row's own
    stands `fill`.

    Args:
        num_rows: rows.
        fill: what stands for nothing.
        dtype: numpy's.
        device: where it lies.

    Attributes:
        data: [rows, width].
        used: [rows] whether the row brought any.
    """

    def __init__(self, num_rows: int, fill: float, dtype: type, device: torch.device):
        self.fill, self.dtype = fill, dtype
        self.used = np.zeros(num_rows, bool)
        self.data = torch.from_numpy(np.empty((num_rows, 0), dtype)).to(device)

    def start(self, rows: np.ndarray, values: list[Any], record: StepRecord) -> None:
        """Rows begin anew with these numbers, arrays or sequences."""
        self.used[rows] = brings = [len(value) > 0 for value in values]
        if not (any(brings) or self.data.numel()):
            return  # no row ever brought any
        width = max(map(len, values))
        self.reserve(width)
        new: np.ndarray = np.full((len(rows), width), self.fill, self.dtype)
        for line, value in zip(new, values, strict=True):
            line[: len(value)] = value
        tensors = record.upload({"rows": rows, "new": new})
        self.data.index_fill_(0, tensors["rows"], self.fill)
        if width:
            self.data[tensors["rows"], :width] = tensors["new"]

    def reserve(self, width: int) -> None:
        """Room for rows of that width. It doubles, so that it seldom grows."""
        old = self.data.shape[1]
        if width > old:
            data = self.data.new_full((len(self.data), 1 << (width - 1).bit_length()), self.fill)
            data[:, :old] = self.data
            self.data = data


def _min_len(start: RowStart) -> int:
    """0: stop tokens may come at once, or there are none."""
    has_minimum = start.stop_token_ids and start.min_len > start.num_prompt_tokens
    return start.min_len if has_minimum else 0


def _allowed_bits(start: RowStart, vocab_size: int) -> np.ndarray:
    token_ids = start.params.allowed_token_ids
    if token_ids is None:
        return np.empty(0, np.int32)
    allowed = np.zeros(-(-vocab_size // 32) * 32, bool)
    allowed[token_ids] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)


def _bad_words(start: RowStart) -> list[int]:
    words = start.params.bad_words_token_ids
    return [token for word in words for token in (*reversed(word), NO_TOKEN)]
