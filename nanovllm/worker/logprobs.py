"""Log-probabilities of drawn tokens and of the most likely ones, and their way to the host.

sampler.py hands it the rows that begin, model_runner.py each step's logits and tokens.
"""

import numpy as np
import torch

from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.step import StepLogprobs
from nanovllm.worker.upload import RING, Uploader

NORMALIZED_LOGITS = 2**24  # there is a float32 copy of so many at a time


class LogprobsReader:
    """Computes them for rows that ask. All get as many as anyone may ask for: that makes next to no
    difference to the device, and what a row gets does not depend on the others.

    Args:
        num_rows: rows that there are.
        vocab_size: of the logits.
        uploader: to the device of the logits.

    Attributes:
        asks: [rows].
    """

    def __init__(self, num_rows: int, vocab_size: int, uploader: Uploader):
        self.uploader = uploader
        self.asks = np.zeros(num_rows, bool)
        self.num_top = min(MAX_LOGPROBS, vocab_size)
        self.num_rows = max(1, NORMALIZED_LOGITS // vocab_size)
        # Page-locked, of each turn: token ids, bits of logprobs, rank. Made when somebody asks.
        self.memory = torch.empty(0)
        self.turn = 0

    def read(
        self, logits: torch.Tensor, token_ids: torch.Tensor, rows: np.ndarray
    ) -> StepLogprobs | None:
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
        index = self.uploader.upload({"index": asking})["index"]
        width = 1 + self.num_top
        if not self.memory.numel():
            shape = (RING, len(self.asks), 2 * width + 1)
            pin = self.uploader.device.type == "cuda"
            self.memory = torch.empty(shape, dtype=torch.int32, pin_memory=pin)
        self.turn = (self.turn + 1) % RING
        host = self.memory[self.turn, : len(asking)]
        for part, lines in zip(index.split(self.num_rows), host.split(self.num_rows), strict=True):
            ids, logprobs, ranks = top_logprobs(logits[part], token_ids[part], self.num_top)
            packed = (ids.int(), logprobs.view(torch.int32), ranks[:, None].int())
            lines.copy_(torch.cat(packed, 1), non_blocking=True)
        lines = host.numpy()
        values = lines[:, width : 2 * width].view(np.float32)
        return StepLogprobs(lines[:, :width], values, lines[:, 2 * width])


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A row's token and its most likely ones, [n, 1 + num_top]; their log-probabilities, float32;
    and how many tokens are at least as likely as the first, [n]."""
    logprobs = logits.log_softmax(-1, dtype=torch.float32)
    own = logprobs.gather(1, token_ids[:, None])
    ranks = (logprobs >= own).sum(-1)
    top, top_ids = logprobs.topk(num_top)
    return torch.cat((token_ids[:, None], top_ids), 1), torch.cat((own, top), 1), ranks
