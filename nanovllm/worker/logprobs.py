"""Log-probabilities of drawn and of known tokens, and of the most likely ones, and their way to the
host.

sampler.py hands it the rows that begin, model_runner.py each step's logits and tokens.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.outputs import LogprobLines
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.worker.upload import RING, Uploader

NORMALIZED_LOGITS = 2**25  # there is a float32 copy of so many at a time


class LogprobsReader:
    """Computes them for rows that ask. All get as many as anyone may ask for: that makes next to no
    difference to the device, and what a row gets does not depend on the others.

    Known tokens are many more, so those get as many as anyone of the step does ask for, and their
    logits are never there all at once.

    Args:
        num_rows: rows that there are.
        vocab_size: of the logits.
        uploader: to the device of the logits.

    Attributes:
        asks: [rows].
        num_rows: so many rows of logits are normalised at a time.
    """

    def __init__(self, num_rows: int, vocab_size: int, uploader: Uploader):
        self.uploader = uploader
        self.asks = np.zeros(num_rows, bool)
        self.num_top = min(MAX_LOGPROBS, vocab_size)
        # By eights, so that parts of aligned logits are: kernels would be compiled once more.
        self.num_rows = max(1, NORMALIZED_LOGITS // vocab_size // 8 * 8)
        # Of each turn. Made when somebody asks.
        self.memory = torch.empty(0)
        self.turn = 0

    def read(
        self, logits: torch.Tensor, token_ids: torch.Tensor, rows: np.ndarray
    ) -> LogprobLines | None:
        """Those of a step, in memory that the device writes to; they stay there for some steps.
        None: no row asks.

        Args:
            logits: [n, vocab], the model's own.
            token_ids: [n], drawn.
            rows: [n].
        """
        asking = np.flatnonzero(self.asks[rows])
        if not asking.size:
            return None
        if not self.memory.numel():
            self.memory = self._host_memory(RING, len(self.asks), num_top=self.num_top)
        self.turn = (self.turn + 1) % RING
        host = self.memory[self.turn, : len(asking)]
        if len(asking) == len(rows):  # no copy of all logits
            return self._write(host, logits.split(self.num_rows), token_ids)
        index = self.uploader.upload({"index": asking})["index"]
        parts = (logits[part] for part in index.split(self.num_rows))
        return self._write(host, parts, token_ids[index])

    def score(
        self,
        step: StepInput,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
    ) -> LogprobLines:
        """Those of the step's scorings, in memory of their own that the device writes to.

        Args:
            hidden: [T, hidden] of the step's tokens, or what lm_head takes instead.
            lm_head: logits, [n, vocab], of some of them.
        """
        scorings, query_lens = step.scorings, step.query_lens
        lens = np.array([len(scoring.token_ids) for scoring in scorings])
        seqs = step.num_decodes + np.array([scoring.chunk for scoring in scorings])
        offsets = np.array([scoring.offset for scoring in scorings])
        firsts = (query_lens.cumsum() - query_lens)[seqs] + offsets
        # Each query token gives the one after it.
        index = np.arange(lens.sum()) + np.repeat(firsts - (lens.cumsum() - lens), lens)
        token_ids = np.concatenate([scoring.token_ids for scoring in scorings]).astype(np.int64)
        new = self.uploader.upload({"index": index, "token_ids": token_ids})
        num_top = min(max(scoring.num_top for scoring in scorings), self.num_top)
        # A pool that knows of the copies under way takes it back.
        host = self._host_memory(len(index), num_top=num_top)
        parts = (lm_head(hidden[part]) for part in new["index"].split(self.num_rows))
        return self._write(host, parts, new["token_ids"])

    def _host_memory(self, *shape: int, num_top: int) -> torch.Tensor:
        """For lines; page-locked for a GPU."""
        pin = self.uploader.device.type == "cuda"
        return torch.empty(*shape, 1 + 2 * (1 + num_top), dtype=torch.int32, pin_memory=pin)

    def _write(
        self,
        host: torch.Tensor,
        logits: Iterable[torch.Tensor],
        token_ids: torch.Tensor,
    ) -> LogprobLines:
        """Lines into memory of the host, part by part.

        Args:
            host: [n, 1 + 2 * width] int32.
            logits: [num_rows, vocab] of each part.
            token_ids: [n].
        """
        lines = torch.empty(host.shape, dtype=torch.int32, device=token_ids.device)
        parts = (tensor.split(self.num_rows) for tensor in (lines, token_ids))
        for part, tokens, of_part in zip(*parts, logits, strict=True):
            ids, logprobs, ranks = ops.top_logprobs(of_part, tokens, host.shape[1] // 2 - 1)
            part[:, 0], part[:, 1::2], part[:, 2::2] = ranks, ids, logprobs.view(torch.int32)
        host.copy_(lines, non_blocking=True)
        return LogprobLines(host.numpy())
