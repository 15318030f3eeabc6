"""Log-probabilities of sampled and of known tokens, and of the most likely ones, and their way to
the host.

The runner calls it with a step's logits and tokens, or hidden states.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.outputs import LogprobLines
from nanovllm.sampling_params import MAX_LOGPROBS
from nanovllm.worker.record import StepRecord

NORMALIZED_LOGITS = 2**25  # logits of which there is a float32 copy at a time


class LogprobsReader:
    """Computes them. Each sampled token comes with the largest number of most likely tokens that a
    request may want: that makes next to no difference to the device, and what a row gets does not
    depend on the others.

    Known tokens are many more: they come with the largest number that a scoring of the step wants,
    and their logits are never there all at once.

    Args:
        max_num_seqs: sampled tokens of a step.
        vocab_size: of the logits.

    Attributes:
        num_rows: rows of logits that are normalised at a time.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int):
        self.max_num_seqs = max_num_seqs
        self.num_top = min(MAX_LOGPROBS, vocab_size)
        # A multiple of 8, so that parts of aligned logits are aligned: kernels would be compiled
        # once more.
        self.num_rows = max(1, NORMALIZED_LOGITS // vocab_size // 8 * 8)

    def read(
        self,
        logits: torch.Tensor,
        token_ids: torch.Tensor,
        wanted: np.ndarray,
        record: StepRecord,
    ) -> LogprobLines:
        """Log-probabilities of sampled tokens, in the record's memory, which the device writes to.

        Args:
            logits: [n, vocab], the model's own.
            token_ids: [n].
            wanted: indices of the tokens that want them.
        """
        if not record.logprob_memory.numel():
            record.logprob_memory = _host_memory(self.max_num_seqs, self.num_top, logits.is_cuda)
        host = record.logprob_memory[: len(wanted)]
        if len(wanted) == len(logits):  # no copy of all logits
            return self._write(host, logits.split(self.num_rows), token_ids)
        index = record.upload({"index": wanted})["index"]
        parts = (logits[part] for part in index.split(self.num_rows))
        return self._write(host, parts, token_ids[index])

    def score(
        self,
        step: StepInput,
        hidden: torch.Tensor,
        lm_head: Callable[[torch.Tensor], torch.Tensor],
        record: StepRecord,
    ) -> LogprobLines:
        """Log-probabilities of the step's scorings, in memory of their own, which the device writes
        to.

        Args:
            hidden: [T, hidden] of the step's tokens.
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
        new = record.upload({"index": index, "token_ids": token_ids})
        num_top = min(max(scoring.num_top for scoring in scorings), self.num_top)
        # A pool that knows of the copies under way takes the memory back.
        host = _host_memory(len(index), num_top, hidden.is_cuda)
        parts = (lm_head(hidden[part]) for part in new["index"].split(self.num_rows))
        return self._write(host, parts, new["token_ids"])

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


def _host_memory(num_lines: int, num_top: int, pin: bool) -> torch.Tensor:
    return torch.empty(num_lines, 1 + 2 * (1 + num_top), dtype=torch.int32, pin_memory=pin)
