"""Logits -> tokens, each row by its own sampling parameters.

model_runner.py hands it the rows that begin and, each step, the logits; the arithmetic is
ops.sample.
"""

import numpy as np
import torch

from nanovllm import ops
from nanovllm.step import RowStart


class Sampler:
    """Keeps the rows' sampling parameters.

    Args:
        num_rows: max_num_seqs.
        vocab_size: of the logits.
        device: of the logits.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device):
        self.vocab_size = vocab_size
        self.device = device
        self.greedy = np.ones(num_rows, bool)
        self.temperature = np.ones(num_rows, np.float32)
        self.top_k = np.full(num_rows, vocab_size, np.int64)
        self.top_p = np.ones(num_rows, np.float32)
        self.min_p = np.zeros(num_rows, np.float32)
        self.seed = np.zeros(num_rows, np.uint64)
        self.min_len = np.zeros(num_rows, np.int64)
        self.stop_token_ids: list[tuple[int, ...]] = [()] * num_rows

    def start_row(self, start: RowStart) -> None:
        row, params = start.row, start.params
        self.greedy[row] = params.is_greedy
        self.temperature[row] = params.temperature
        self.top_k[row] = (
            min(params.top_k, self.vocab_size) if params.top_k > 0 else self.vocab_size
        )
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seed[row] = start.seed
        self.min_len[row] = start.min_len
        self.stop_token_ids[row] = start.stop_token_ids

    def sample(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        """Draw a token for each row.

        Args:
            logits: [n, vocab]; may be written to.
            rows: [n].
            positions: [n], the place that each drawn token takes in its sequence.

        Returns: [n] int64.
        """
        for i in np.flatnonzero(positions < self.min_len[rows]):
            logits[i, list(self.stop_token_ids[rows[i]])] = -torch.inf
        random = np.flatnonzero(~self.greedy[rows])
        if len(random) == 0:
            return logits.argmax(-1)
        if len(random) == len(rows):
            return self._draw(logits, rows, positions)
        token_ids = logits.argmax(-1)
        token_ids[random] = self._draw(logits[random], rows[random], positions[random])
        return token_ids

    def _draw(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> torch.Tensor:
        # A warper that no row asks for is left out: the next two cost a sort.
        asked_k = bool((self.top_k[rows] < self.vocab_size).any())
        asked_p = bool((self.top_p[rows] < 1).any())
        asked_min_p = bool((self.min_p[rows] > 0).any())
        return ops.sample(
            logits,
            self._tensor(self.temperature[rows]),
            self._tensor(noise_keys(self.seed[rows], positions)),
            top_k=self._tensor(self.top_k[rows]) if asked_k else None,
            top_p=self._tensor(self.top_p[rows]) if asked_p else None,
            min_p=self._tensor(self.min_p[rows]) if asked_min_p else None,
        )

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


def noise_keys(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Two 32-bit keys for each draw, from 64 bits of (seed, position) (splitmix64, Steele et al.
    2014).

    Args:
        seeds: [n] uint64.
        positions: [n] int64.

    Returns: [n, 2] int64.
    """
    with np.errstate(over="ignore"):
        x = seeds + (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    keys = np.stack((x >> np.uint64(32), x & np.uint64(0xFFFFFFFF)), axis=1)
    return keys.astype(np.int64)
