"""Samples again for the rows whose logits are changed first: by penalties, biases, bad words,
min_tokens, allowed tokens, grammars or Python processors.

The runner calls it behind a step's forward, which has sampled for all rows by temperature, top_k,
top_p and min_p. logits.py and host_processors.py change the logits.
"""

import numpy as np
import torch

from nanovllm import ops
from nanovllm.ops.batch import Draws
from nanovllm.worker.host_processors import HostProcessors
from nanovllm.worker.logits import LogitsProcessors
from nanovllm.worker.record import StepRecord
from nanovllm.worker.rows import Rows

PROCESSED_LOGITS = 2**24  # logits that are copied and changed at a time


class Sampler:
    """The second draw.

    Args:
        rows: the state of all rows.
    """

    def __init__(self, rows: Rows):
        self.of = rows
        self.processors, self.host = LogitsProcessors(rows), HostProcessors(rows)

    def sample(
        self,
        token_ids: torch.Tensor,
        logits: torch.Tensor,
        draws: Draws,
        rows: np.ndarray,
        positions: np.ndarray,
        record: StepRecord,
    ) -> bool:
        """Replace the tokens of rows whose logits are changed. Returns whether there were any.

        Args:
            token_ids: [n] int64, by the model's own logits.
            logits: [n, vocab].
            draws: of the n tokens, limits included.
            rows, positions: [n], the tokens' rows and places in their sequences.
        """
        changed = np.flatnonzero(self.of.changes(rows, positions))
        if not changed.size:
            return False
        rows, positions = rows[changed], positions[changed]
        self.host.catch_up(rows)
        columns = record.upload({"index": changed, **self.processors.columns(rows, positions)})
        index = columns["index"]
        num = len(draws) if self.of.limited[rows].any() else 2  # without limits
        tensors = [tensor for tensor in draws[:num] if tensor is not None]
        step = max(1, PROCESSED_LOGITS // max(self.of.vocab_size, self.of.bad_words.data.shape[1]))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            at = index[part]
            own = logits[at].float()
            of_part = {name: column[part] for name, column in columns.items()}
            own = self.processors.apply(own, rows[part], positions[part], of_part)
            self.host.apply(own, rows[part], record)
            is_blocked = ~(own.amax(1) > -torch.inf)  # NaN too, of a Python processor
            record.block(changed[part], is_blocked)
            own.masked_fill_(is_blocked[:, None], 0)  # the draw gives a token all the same
            # Copies, not slices: kernels would be compiled once more for unaligned ones.
            token_ids[at] = ops.sample(own, *(x[at] for x in tensors))
        self.processors.keep(rows, positions, token_ids[index], record)
        self.host.keep(rows, changed, record)
        return True
