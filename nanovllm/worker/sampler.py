"""Logits -> tokens, each row by its own sampling parameters.

model_runner.py hands it the rows that begin and, each step, the logits; the arithmetic is
ops.sample.
"""

from itertools import pairwise

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import RowStart
from nanovllm.worker.host_processors import HostProcessors
from nanovllm.worker.logits import LogitsProcessors
from nanovllm.worker.logprobs import LogprobsReader
from nanovllm.worker.upload import Uploader

PROCESSED_LOGITS = 2**24  # rows that ask for more than a draw are copied so many logits at a time


class Sampler:
    """Keeps the rows' sampling parameters, in columns. Temperature 0 takes the most likely token;
    that is also what a row does that was never started.

    Args:
        num_rows: rows that there are.
        vocab_size: of the logits.
        uploader: to the device of the logits.
    """

    def __init__(self, num_rows: int, vocab_size: int, uploader: Uploader):
        self.vocab_size = vocab_size
        self.uploader = uploader
        self.temperature = np.zeros(num_rows, np.float32)
        self.top_k = np.full(num_rows, vocab_size, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.warps = np.zeros(num_rows, bool)  # draws by more than temperature
        # Of all rows, as they were last started; and nobody asks for log-probabilities.
        self.all_plain = True
        self.seed = np.zeros(num_rows, np.uint64)
        # The same on a GPU, for the draws of ops.begin_step.
        self.device_state = {
            "temperature": torch.zeros(num_rows, device=uploader.device),
            "seed": torch.zeros(num_rows, dtype=torch.int64, device=uploader.device),
        }
        self.processors = LogitsProcessors(num_rows, vocab_size, uploader)
        self.host = HostProcessors(num_rows, uploader)
        self.logprobs = LogprobsReader(num_rows, vocab_size, uploader)

    def forget_rows(self) -> None:
        """As if none was ever started."""
        self.warps[:], self.logprobs.asks[:], self.all_plain = False, False, True
        self.processors.asks[:], self.processors.min_len[:] = False, 0

    def start_rows(self, starts: list[RowStart]) -> None:
        """Sequences take over rows."""
        if not starts:
            return
        for start in starts:
            self.start_row(start)
        self.processors.start_rows(starts)
        self.host.start_rows(starts)
        changes = self.processors.asks.any() or self.processors.min_len.any()
        self.all_plain = not (self.warps.any() or changes or self.logprobs.asks.any())
        if self.uploader.device.type != "cpu":
            rows = np.array([start.row for start in starts])
            temperature, seed = self.temperature[rows], self.seed[rows].view(np.int64)
            new = self.uploader.upload({"rows": rows, "temperature": temperature, "seed": seed})
            for name, column in self.device_state.items():
                column[new["rows"]] = new[name]

    def start_row(self, start: RowStart) -> None:
        row, params = start.row, start.params
        self.temperature[row] = 0 if params.is_greedy else params.temperature
        self.top_k[row] = (
            min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        )
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        limits = self.top_k[row] < self.vocab_size or params.top_p < 1 or params.min_p > 0
        self.warps[row] = limits and not params.is_greedy
        self.seed[row] = start.seed
        self.logprobs.asks[row] = params.logprobs is not None

    def is_plain(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        """Whether temperature and noise are all that the rows' draws depend on."""
        return self.all_plain or not (
            self.warps[rows].any() or self.processors.asking(rows, positions).any()
        )

    def sample(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Draw a token for each row.

        Args:
            logits: [n, vocab].
            rows: [n].
            positions: [n], the place that each drawn token takes in its sequence.

        Returns: [n] int64.
        """
        asks = self.processors.asking(rows, positions)
        if not asks.any():
            return ops.sample(logits, **self.uploader.upload(self._draws(rows, positions)))
        self.host.catch_up(rows)
        # Those that ask come last, and in parts: a float32 copy of their logits is changed.
        order = np.argsort(asks, kind="stable")
        draws = self.uploader.upload({"order": order, **self._draws(rows, positions)})
        places = draws.pop("order")
        rows, positions = rows[order], positions[order]
        columns = self.uploader.upload(self.processors.columns(rows, positions))
        token_ids = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
        num_plain = len(rows) - int(asks.sum())
        step = max(1, PROCESSED_LOGITS // self.vocab_size)
        for first, last in pairwise([0, *range(num_plain, len(rows), step), len(rows)]):
            if first == last:
                continue  # none is plain
            part = slice(first, last)
            index = places[part]
            own = logits[index]
            if first >= num_plain:
                tensors = {name: column[part] for name, column in columns.items()}
                own = self.processors.apply(own.float(), rows[part], positions[part], tensors)
                self.host.apply(own, rows[part])
            # Copies, not slices: kernels would be compiled once more for those that aren't aligned.
            token_ids[index] = ops.sample(own, **{name: x[index] for name, x in draws.items()})
        self.processors.keep(rows, positions, token_ids[places])
        return token_ids

    def _draws(self, rows: np.ndarray, positions: np.ndarray) -> dict[str, np.ndarray]:
        """What ops.sample takes beside logits."""
        return {
            "temperature": self.temperature[rows],
            "noise_keys": noise_keys(self.seed[rows], positions),
            **self._limits(rows),
        }

    def _limits(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """The warpers that a row asks for; the others are left out, as two of them cost a sort."""
        random = rows[self.temperature[rows] > 0]
        limits = {}
        if (self.top_k[random] < self.vocab_size).any():
            limits["top_k"] = self.top_k[rows]
        if (self.top_p[random] < 1).any():
            limits["top_p"] = self.top_p[rows]
        if (self.min_p[random] > 0).any():
            limits["min_p"] = self.min_p[rows]
        return limits


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two 32-bit keys for each draw, from 64 bits of (seed, position) (splitmix64, Steele et al.
    2014).

    Args:
        seeds: [n] uint64.
        positions: [n] int64.

    Returns: [n, 2] int64.
    """
    x: np.ndarray = seeds + (positions.astype(np.uint64) + 1) * 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    return np.stack((x >> 32, x & 0xFFFFFFFF), axis=1).astype(np.int64)
