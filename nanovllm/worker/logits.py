"""What requests ask of their logits before a token is drawn: masks, biases, penalties, as in vLLM
and in its order.

sampler.py hands it the rows that begin and, each step, the logits of those that ask. A step may run
before the host has seen the tokens of the one before, so what depends on generated tokens reads
them on the device, from the rows' history, which the steps that draw them write. Nothing here waits
for the device (docs/decisions/0014).
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from nanovllm.core.step import RowStart
from nanovllm.worker.upload import Uploader

NO_TOKEN = -1
NO_WORDS = np.empty((0, 0), np.int32)


class LogitsProcessors:
    """Keeps what the rows ask for, and applies it.

    Args:
        num_rows: rows that there are.
        vocab_size: of the logits.
        uploader: to the device of the logits.

    Attributes:
        asks: [rows] whether its logits are always changed; below min_len those of stop tokens are.
        allowed: a bit for each token of the vocabulary.
        bad_words: token sequences, the last token first.
        history: tokens by position, prompt and output, of the rows that need them.
    """

    def __init__(self, num_rows: int, vocab_size: int, uploader: Uploader):
        self.vocab_size = vocab_size
        self.uploader = uploader
        self.asks = np.zeros(num_rows, bool)
        self.min_len = np.zeros(num_rows, np.int64)
        self.num_prompt_tokens = np.zeros(num_rows, np.int64)
        self.presence = np.zeros(num_rows, np.float32)
        self.frequency = np.zeros(num_rows, np.float32)
        self.repetition = np.ones(num_rows, np.float32)

        def table(fill: float, dtype: type = np.int32, num_dims: int = 1) -> RowTable:
            return RowTable(num_rows, num_dims, fill, dtype, uploader)

        self.allowed = table(fill=-1)  # all bits
        self.bad_words = table(fill=NO_TOKEN, num_dims=2)
        self.stop_token_ids = table(fill=NO_TOKEN)
        self.bias_ids, self.bias = table(fill=0), table(fill=0, dtype=np.float32)
        self.history = table(fill=0)

    def start_rows(self, starts: list[RowStart]) -> None:
        """Sequences take over rows."""
        rows = np.array([start.row for start in starts])
        self.asks[rows] = [start.params.changes_logits for start in starts]
        self.min_len[rows] = [_min_len(start) for start in starts]
        asking = self.asks[rows] | (self.min_len[rows] > 0)
        if not asking.any():
            return
        rows, starts = rows[asking], [starts[i] for i in np.flatnonzero(asking)]
        self.num_prompt_tokens[rows] = [start.num_prompt_tokens for start in starts]
        self.presence[rows] = [start.params.presence_penalty for start in starts]
        self.frequency[rows] = [start.params.frequency_penalty for start in starts]
        self.repetition[rows] = [start.params.repetition_penalty for start in starts]
        biases = [start.params.logit_bias or {} for start in starts]
        self.allowed.start(rows, [self._allowed_bits(start) for start in starts])
        self.bad_words.start(rows, [_bad_words(start) for start in starts])
        self.stop_token_ids.start(rows, [start.stop_token_ids for start in starts])
        self.bias_ids.start(rows, [list(bias) for bias in biases])
        self.bias.start(rows, [list(bias.values()) for bias in biases])
        self.history.start(rows, [s.token_ids if s.params.reads_history else () for s in starts])

    def asking(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Whether the logits of these rows, for the tokens at these positions, are changed."""
        return self.asks[rows] | (positions < self.min_len[rows])

    def columns(self, rows: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """What `apply` needs on the device."""
        return {
            "rows": rows,
            "positions": positions[:, None],
            "min_len": self.min_len[rows, None],
            "num_prompt_tokens": self.num_prompt_tokens[rows, None],
            "presence": self.presence[rows, None],
            "frequency": self.frequency[rows, None],
            "repetition": self.repetition[rows, None],
        }

    def apply(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        columns: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        """Every step that one of the rows asks for; it leaves the logits of the others as they are.

        Args:
            logits: [n, vocab] float32, written to.
            rows, positions: [n], of the tokens to be drawn.
            columns: of the same rows.
        """
        index, places = columns["rows"], columns["positions"]
        if self.allowed.used[rows].any():
            keep_allowed(logits, self.allowed.data[index])
        if self.bad_words.used[rows].any():
            words = self.bad_words.data[index]
            ban_bad_words(logits, words, self._last_outputs(words.shape[2] - 1, columns))
        if (positions < self.min_len[rows]).any():
            stops = self.stop_token_ids.data[index]
            ban(logits, stops, (stops != NO_TOKEN) & (places < columns["min_len"]))
        if self.bias.used[rows].any():
            logits.scatter_add_(1, self.bias_ids.data[index].long(), self.bias.data[index])
        if self.penalizes(rows).any():
            num_tokens = int(positions[self.history.used[rows]].max())
            tokens = self.history.data[index, :num_tokens].long()
            place = torch.arange(num_tokens, device=logits.device)
            is_known = place < places
            is_output = is_known & (place >= columns["num_prompt_tokens"])
            logits = penalize(
                logits,
                count(tokens, is_known, self.vocab_size),
                count(tokens, is_output, self.vocab_size),
                *(columns[name] for name in ("repetition", "frequency", "presence")),
            )
        return logits

    def keep(self, rows: np.ndarray, positions: np.ndarray, token_ids: torch.Tensor) -> None:
        """Drawn tokens join the history of the rows that have one."""
        kept = np.flatnonzero(self.history.used[rows])
        if kept.size:
            rows, positions = rows[kept], positions[kept]
            self.history.reserve(int(positions.max()) + 1)
            new = self.uploader.upload({"kept": kept, "rows": rows, "positions": positions})
            self.history.data[new["rows"], new["positions"]] = token_ids[new["kept"]].int()

    def penalizes(self, rows: np.ndarray) -> np.ndarray:
        is_neutral = (self.presence == 0) & (self.frequency == 0) & (self.repetition == 1)
        return ~is_neutral[rows]

    def _allowed_bits(self, start: RowStart) -> np.ndarray:
        token_ids = start.params.allowed_token_ids
        if token_ids is None:
            return np.empty(0, np.int32)
        allowed = np.zeros(-(-self.vocab_size // 32) * 32, bool)
        allowed[token_ids] = True
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def _last_outputs(self, num: int, columns: dict[str, torch.Tensor]) -> torch.Tensor:
        """The last generated tokens, the latest first, [n, num]; before the first there is one that
        equals nothing."""
        history = self.history.data
        places = columns["positions"] - 1 - torch.arange(num, device=history.device)
        # Rows without a history have no words that ask for it.
        tokens = history[columns["rows"][:, None], places.clamp(0, history.shape[1] - 1)]
        return tokens.masked_fill_(places < columns["num_prompt_tokens"], NO_TOKEN - 1)


class RowTable:
    """Numbers that rows bring, on the device, as wide as the widest so far; behind a row's own
    stands `fill`.

    Args:
        num_rows: rows that there are.
        num_dims: of a row.
        fill: what stands for nothing.
        dtype: numpy's.
        uploader: to the device.

    Attributes:
        data: [rows, ...].
        used: [rows] whether it brought any.
    """

    def __init__(self, num_rows: int, num_dims: int, fill: float, dtype: type, uploader: Uploader):
        self.fill, self.dtype = fill, dtype
        self.uploader = uploader
        self.used = np.zeros(num_rows, bool)
        empty = torch.from_numpy(np.empty((num_rows, *[0] * num_dims), dtype))
        self.data = empty.to(uploader.device)

    def start(self, rows: np.ndarray, values: list[Any]) -> None:
        """Rows begin anew with these numbers, arrays or sequences."""
        self.used[rows] = brings = [len(value) > 0 for value in values]
        if not (any(brings) or self.data.numel()):
            return  # nobody ever brought any
        arrays: list[np.ndarray] = [np.asarray(value, self.dtype) for value in values]
        shape = np.max([array.shape for array in arrays], axis=0).tolist()
        self.reserve(*shape)
        new = np.full((len(rows), *shape), self.fill, self.dtype)
        for line, array in zip(new, arrays, strict=True):
            line[_corner(array.shape)] = array
        tensors = self.uploader.upload({"rows": rows, "new": new})
        self.data.index_fill_(0, tensors["rows"], self.fill)
        if new.size:
            place: tuple[Any, ...] = (tensors["rows"], *_corner(shape))
            self.data[place] = tensors["new"]

    def reserve(self, *shape: int) -> None:
        """Room for rows of that shape. It doubles, so that it seldom grows."""
        old = self.data.shape[1:]
        pairs = list(zip(shape, old, strict=True))
        if any(n > room for n, room in pairs):
            wider = [max(1 << (n - 1).bit_length(), room) for n, room in pairs]
            data = self.data.new_full((len(self.data), *wider), self.fill)
            place = (slice(None), *_corner(old))
            data[place] = self.data
            self.data = data


def keep_allowed(logits: torch.Tensor, bits: torch.Tensor) -> None:
    """Only tokens whose bit is set can be drawn: [n, vocab / 32] int32, the lowest bit first."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    is_allowed = ((bits[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]]
    logits.masked_fill_(is_allowed == 0, -torch.inf)


def ban_bad_words(logits: torch.Tensor, words: torch.Tensor, last_outputs: torch.Tensor) -> None:
    """A token that would complete a word can't be drawn.

    Args:
        words: [n, words, tokens], the last token first, NO_TOKEN behind the first one.
        last_outputs: [n, tokens - 1], the latest first.
    """
    last, before = words[:, :, 0], words[:, :, 1:]
    is_next = ((before == last_outputs[:, None]) | (before == NO_TOKEN)).all(-1)
    ban(logits, last, is_next & (last != NO_TOKEN))


def ban(logits: torch.Tensor, token_ids: torch.Tensor, is_banned: torch.Tensor) -> None:
    """The tokens ([n, m]) that are banned can't be drawn. All others are given 0: a selection would
    have to know how many they are, and wait for the device."""
    change = torch.zeros_like(token_ids, dtype=logits.dtype).masked_fill_(is_banned, -torch.inf)
    logits.scatter_add_(1, token_ids.clamp(min=0).long(), change)


def count(tokens: torch.Tensor, counts: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """How often each token of the vocabulary is among those that count, [n, vocab] float32."""
    zeros = torch.zeros(len(tokens), vocab_size, device=tokens.device)
    return zeros.scatter_add_(1, tokens, counts.float())


def penalize(
    logits: torch.Tensor,
    known: torch.Tensor,
    output: torch.Tensor,
    repetition: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
) -> torch.Tensor:
    """Penalties on tokens that have occurred: repetition (Keskar et al. 2019) divides a logit above
    0 and multiplies one below; frequency (times each occurrence) and presence are subtracted, as in
    OpenAI's API.

    Args:
        logits: [n, vocab].
        known, output: [n, vocab] how often each token has occurred: anywhere, and in the output.
        repetition, frequency, presence: [n, 1].
    """
    weakened = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(known > 0, weakened, logits)
    return logits.sub_(frequency * output).sub_(presence * (output > 0))


def _min_len(start: RowStart) -> int:
    """0: stop tokens may come at once, or there are none."""
    has_minimum = start.stop_token_ids and start.min_len > start.num_prompt_tokens
    return start.min_len if has_minimum else 0


def _bad_words(start: RowStart) -> np.ndarray:
    words = start.params.bad_words_token_ids
    if not words:
        return NO_WORDS
    array = np.full((len(words), max(map(len, words))), NO_TOKEN, np.int32)
    for line, word in zip(array, words, strict=True):
        line[: len(word)] = word[::-1]
    return array


def _corner(shape: Iterable[int]) -> tuple[slice, ...]:
    """The first so many along each dimension."""
    return tuple(slice(n) for n in shape)
