"""The rows' state and both draws without a model: what the tests of sampling share."""

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import RowStart, StepInput
from nanovllm.ops.reference_attention import TorchAttention
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.logprobs import LogprobsReader
from nanovllm.worker.record import make_records
from nanovllm.worker.rows import Rows
from nanovllm.worker.sampler import Sampler


class RowSampling:
    """Rows whose sequences are about to sample.

    Args:
        params: of rows 0, 1, ...; their seeds are 100, 101, ...
        num_rows: rows, if there are more.

    Attributes:
        record: the last step's.
    """

    def __init__(
        self, params, vocab_size, stop_token_ids=(), min_len=0, num_rows=None, device="cpu"
    ):
        device = torch.device(device)
        num_rows = num_rows or len(params)
        self.rows = Rows(num_rows, 1, 64, vocab_size, device)
        self.inputs = InputBuilder(self.rows, (TorchAttention(),), 16, num_rows)
        self.records, self.host_tokens = make_records(num_rows, 1, num_rows, device)
        self.num_steps = 0
        self.sampler, self.logprobs = Sampler(self.rows), LogprobsReader(num_rows, vocab_size)
        self.record = self.take_record()
        starts = enumerate(params)
        self.start([RowStart(row, 0, p, 100 + row, stop_token_ids, min_len) for row, p in starts])

    def take_record(self):
        record = self.records[self.num_steps % len(self.records)]
        self.num_steps += 1
        record.begin()
        return record

    def start(self, starts):
        self.rows.start(starts, self.record)

    def sample(self, logits, rows, positions):
        """Tokens for [n, vocab] logits of rows, at positions of their sequences, as a runner's step
        of decodes samples them."""
        record = self.record = self.take_record()
        blocks = np.full((1, len(rows)), -1, np.int32)
        step = StepInput(decode_rows=rows, decode_positions=positions - 1, decode_blocks=blocks)
        self.inputs.begin(step, record)
        n, tensors = len(rows), self.inputs.tensors
        draws = tensors.draws if self.rows.limited[rows].any() else tensors.draws[:2]
        token_ids = ops.sample(logits, *(x[:n] for x in draws))
        self.sampler.sample(token_ids, logits, tensors.draws, rows, positions, record)
        record.end()
        return token_ids

    def read_logprobs(self, logits, token_ids, rows):
        wanted = np.flatnonzero(self.rows.wants_logprobs[rows])
        return self.logprobs.read(logits, token_ids, wanted, self.record)
