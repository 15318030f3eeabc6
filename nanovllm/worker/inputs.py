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
        batch = self.batch(tensors, max(step.query_lens), step.num_decodes)
        return batch, tensors["sampled_rows"]

    def arrays(self, step: StepInput, graph_size: int | None = None) -> dict[str, np.ndarray]:
        """Bring the rows up to date; what the step's batch is made of, for the device.

        Args:
            graph_size: None, or the number of decodes that a CUDA graph was captured for: the
                step's are padded to it, and shapes depend on it alone.
        """
        self._update_tables(step)
        rows = np.array(step.rows)
        query_lens = np.array(step.query_lens)
        first_positions = np.array(step.positions)
        query_start = np.concatenate(([0], query_lens.cumsum()))
        context_lens = first_positions + query_lens

        # Per token: its sequence, its position, its slot.
        seqs = np.repeat(np.arange(len(rows)), query_lens)
        positions = np.arange(query_start[-1]) + (first_positions - query_start[:-1])[seqs]
        pages = self.host_tables[rows[seqs], positions // self.block_size].astype(np.int64)
        slots = pages * self.block_size + positions % self.block_size
        slots[positions < self.num_cached_tokens[rows[seqs]]] = -1
        arrays = self.attention.host_arrays(
            self.host_tables,
            rows,
            query_start,
            query_lens,
            context_lens,
            step.num_decodes,
            graph_size,
        )
        if graph_size is not None:  # decodes: a token each
            missing = graph_size - len(rows)
            rows = np.append(rows, np.full(missing, self.padding_row))
            positions = np.append(positions, np.zeros(missing, np.int64))
            slots = np.append(slots, np.full(missing, -1))
            context_lens = np.append(context_lens, np.ones(missing, np.int64))
            query_start = np.arange(graph_size + 1)
        else:
            arrays["known_tokens"] = np.array(step.token_ids, np.int64)
            arrays["logits_indices"] = query_start[1:][step.samples] - 1
            arrays["sampled_rows"] = rows[step.samples]
        return {
            "rows": rows,
            "positions": positions,
            "slot_mapping": slots,
            "query_start": query_start.astype(np.int32),
            "context_lens": context_lens.astype(np.int32),
            **arrays,
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

    def _update_tables(self, step: StepInput) -> None:
        for start in step.starts:
            self.num_cached_tokens[start.row] = start.num_cached_tokens
            self.host_tables[start.row] = 0
        for row, first, pages in step.new_pages:
            self.host_tables[row, first : first + len(pages)] = pages
        if self.block_tables.device.type == "cpu" or not step.new_pages:
            return
        # A new sequence's row keeps pages of the former one behind its own: no kernel reads there.
        width = self.host_tables.shape[1]
        changes = self.uploader.upload({
            "index": np.concatenate([
                np.arange(row * width + first, row * width + first + len(pages))
                for row, first, pages in step.new_pages
            ]),
            "pages": np.concatenate([pages for _, _, pages in step.new_pages]).astype(np.int32),
        })  # fmt: skip
        self.block_tables.view(-1)[changes["index"]] = changes["pages"]
