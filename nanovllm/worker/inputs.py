"""StepInput -> ForwardBatch: the rows' state (block tables, last sampled tokens) turned into what a
forward sees.

model_runner.py calls it once a step, and gives it the sampled tokens back.
"""

import numpy as np
import torch

from nanovllm.batch import ForwardBatch
from nanovllm.step import StepInput


class InputBuilder:
    """Keeps the rows' state and builds each step's batch from it.

    Args:
        num_rows: max_num_seqs.
        max_blocks: pages of the longest sequence.
        block_size: tokens a page.
        device: of the batches.
    """

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device):
        self.block_size = block_size
        self.device = device
        self.block_tables = np.zeros((num_rows, max_blocks), np.int32)
        self.num_cached_tokens = np.zeros(num_rows, np.int64)
        self.last_tokens = torch.zeros(num_rows, dtype=torch.int64, device=device)

    def build(self, step: StepInput) -> ForwardBatch:
        for start in step.starts:
            self.num_cached_tokens[start.row] = start.num_cached_tokens
            self.block_tables[start.row] = 0
        for row, first, pages in step.new_pages:
            self.block_tables[row, first : first + len(pages)] = pages
        rows = np.array(step.rows)
        query_lens = np.array(step.query_lens)
        first_positions = np.array(step.positions)
        query_start = np.concatenate(([0], query_lens.cumsum()))
        context_lens = first_positions + query_lens

        # Per token: its sequence, its position, its slot.
        seqs = np.repeat(np.arange(len(rows)), query_lens)
        positions = np.arange(query_start[-1]) + (first_positions - query_start[:-1])[seqs]
        pages = self.block_tables[rows[seqs], positions // self.block_size].astype(np.int64)
        slots = pages * self.block_size + positions % self.block_size
        slots[positions < self.num_cached_tokens[rows[seqs]]] = -1

        num_blocks = -(-int(context_lens.max()) // self.block_size)
        decode_rows = torch.from_numpy(rows[: step.num_decodes]).to(self.device)
        known_tokens = torch.tensor(step.token_ids, dtype=torch.int64, device=self.device)
        return ForwardBatch(
            token_ids=torch.cat((self.last_tokens[decode_rows], known_tokens)),
            positions=self._tensor(positions, np.int64),
            slot_mapping=self._tensor(slots, np.int64),
            block_tables=self._tensor(self.block_tables[rows, :num_blocks], np.int32),
            query_start=self._tensor(query_start, np.int32),
            context_lens=self._tensor(context_lens, np.int32),
            max_query_len=int(query_lens.max()),
            num_decodes=step.num_decodes,
            logits_indices=self._tensor(query_start[1:][step.samples] - 1, np.int64),
        )

    def keep_sampled(self, rows: np.ndarray, token_ids: torch.Tensor) -> None:
        """Remember the sampled tokens: the rows' next decodes feed on them."""
        self.last_tokens[torch.from_numpy(rows).to(self.device)] = token_ids

    def _tensor(self, array: np.ndarray, dtype: type) -> torch.Tensor:
        return torch.from_numpy(array.astype(dtype)).to(self.device)
