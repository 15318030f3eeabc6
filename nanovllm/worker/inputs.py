"""StepInput -> ForwardBatch: the rows' state (block tables, last sampled tokens) turned into what a
forward sees.

model_runner.py calls it once a step, and gives it the sampled tokens back.
"""

import numpy as np
import torch

from nanovllm.batch import Attention, ForwardBatch
from nanovllm.step import StepInput
from nanovllm.worker.upload import Uploader


class InputBuilder:
    """Keeps the rows' state and builds each step's batch from it.

    Args:
        num_rows: max_num_seqs. There is one more, which the padding of CUDA graphs uses.
        max_blocks: pages of the longest sequence.
        block_size: tokens a page.
        attention: the backend that reads the cache.
        uploader: to the device of the batches.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        attention: Attention,
        uploader: Uploader,
    ):
        self.block_size = block_size
        self.attention = attention
        self.uploader = uploader
        self.padding_row = num_rows
        self.host_tables = np.zeros((num_rows + 1, max_blocks), np.int32)
        self.num_cached_tokens = np.zeros(num_rows + 1, np.int64)
        # On a CPU the table is the host's own memory.
        self.block_tables = torch.from_numpy(self.host_tables).to(uploader.device)
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=uploader.device)

    def build(self, step: StepInput) -> tuple[ForwardBatch, torch.Tensor]:
        """The step's batch, in new memory, and the rows that sample, [n] int64."""
        tensors = self.uploader.upload(self.arrays(step))
        batch = self.batch(tensors, int(step.query_lens.max()), step.num_decodes)
        return batch, tensors["sampled_rows"]

    def arrays(self, step: StepInput) -> dict[str, np.ndarray]:
        """Bring the rows up to date; what the step's batch is made of, for the device."""
        self._update_tables(step)
        rows, query_lens, first_positions = step.rows, step.query_lens, step.positions
        query_start = np.concatenate(([0], query_lens.cumsum()))
        context_lens = first_positions + query_lens
        # Per token: its sequence, its position, its slot.
        seqs = np.repeat(np.arange(len(rows)), query_lens)
        known_tokens = [chunk.token_ids for chunk in step.chunks]
        positions = np.arange(query_start[-1]) + (first_positions - query_start[:-1])[seqs]
        slots = self._slots(rows[seqs], positions)
        slots[positions < self.num_cached_tokens[rows[seqs]]] = -1
        return {
            "rows": rows,
            "positions": positions,
            "slot_mapping": slots,
            "query_start": query_start.astype(np.int32),
            "context_lens": context_lens.astype(np.int32),
            "known_tokens": np.concatenate([np.empty(0, np.int64), *known_tokens]),
            "logits_indices": query_start[1:][step.samples] - 1,
            "sampled_rows": rows[step.samples],
            **self.attention.host_arrays(
                self.host_tables,
                rows,
                query_start,
                query_lens,
                context_lens,
                step.num_decodes,
                None,
            ),
        }

    def decode_arrays(self, step: StepInput, graph_size: int) -> dict[str, np.ndarray]:
        """The same for a step of decodes and the CUDA graph that was captured for so many: they are
        padded to it, and shapes depend on it alone."""
        self._update_tables(step)
        n = step.num_decodes
        rows = np.full(graph_size, self.padding_row)
        rows[:n] = step.decode_rows
        positions = np.zeros(graph_size, np.int64)
        positions[:n] = step.decode_positions
        slots = self._slots(rows, positions)
        slots[n:] = -1
        query_start = np.arange(graph_size + 1)
        context_lens = positions + 1
        return {
            "rows": rows,
            "positions": positions,
            "slot_mapping": slots,
            "query_start": query_start.astype(np.int32),
            "context_lens": context_lens.astype(np.int32),
            **self.attention.host_arrays(
                self.host_tables,
                step.decode_rows,
                query_start[: n + 1],
                np.ones(n, np.int64),
                context_lens[:n],
                n,
                graph_size,
            ),
        }

    def batch(
        self, tensors: dict[str, torch.Tensor], max_query_len: int, num_decodes: int
    ) -> ForwardBatch:
        """The batch of uploaded arrays. It asks nothing of the host: a CUDA graph can hold it."""
        token_ids = self.last_tokens[tensors["rows"][:num_decodes]]
        if "known_tokens" in tensors:
            token_ids = torch.cat((token_ids, tensors["known_tokens"]))
        return ForwardBatch(
            token_ids=token_ids,
            positions=tensors["positions"],
            slot_mapping=tensors["slot_mapping"],
            block_tables=self.block_tables,
            rows=tensors["rows"],
            query_start=tensors["query_start"],
            context_lens=tensors["context_lens"],
            max_query_len=max_query_len,
            num_decodes=num_decodes,
            logits_indices=tensors.get("logits_indices"),
            attention=self.attention,
            attention_arrays=tensors,
        )

    def keep_sampled(self, rows: torch.Tensor, token_ids: torch.Tensor) -> None:
        """Remember the sampled tokens: the rows' next decodes feed on them."""
        self.last_tokens[rows] = token_ids

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where keys and values of these tokens lie."""
        index, offset = np.divmod(positions, self.block_size)
        return self.host_tables[rows, index] * np.int64(self.block_size) + offset

    def _update_tables(self, step: StepInput) -> None:
        on_gpu = self.block_tables.device.type != "cpu"
        for start in step.starts:
            self.num_cached_tokens[start.row] = start.num_cached_tokens
            self.host_tables[start.row] = 0
            self.host_tables[start.row, : len(start.block_table)] = start.block_table
        num_pages = max((len(start.block_table) for start in step.starts), default=0)
        if on_gpu and num_pages:
            # Behind these, rows keep the pages of their former sequences: no kernel reads there.
            rows = np.array([start.row for start in step.starts])
            new = self.uploader.upload({"rows": rows, "tables": self.host_tables[rows, :num_pages]})
            self.block_tables[new["rows"], :num_pages] = new["tables"]

        opening = np.flatnonzero(step.decode_pages >= 0)
        if not len(opening):
            return
        rows, pages = step.decode_rows[opening], step.decode_pages[opening]
        indices = step.decode_positions[opening] // self.block_size
        self.host_tables[rows, indices] = pages
        if on_gpu:
            places = rows * self.host_tables.shape[1] + indices
            new = self.uploader.upload({"places": places, "pages": pages})
            self.block_tables.view(-1)[new["places"]] = new["pages"]
