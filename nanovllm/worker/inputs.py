"""StepInput -> ForwardBatch: the rows' state (block tables, last sampled tokens) turned into what a
forward sees.

model_runner.py calls it once a step, and gives it the sampled tokens back. A step with chunks is
built on the host, in numpy. One of decodes alone differs little from the step before: on a GPU a
kernel makes its inputs from the rows' state, and the attention's list of work serves several steps.
"""

from functools import partial

import numpy as np
import torch

from nanovllm import ops
from nanovllm.batch import Attention, ForwardBatch
from nanovllm.step import StepInput
from nanovllm.worker.cuda_graph import DecodeGraphs
from nanovllm.worker.upload import RING, Uploader


class InputBuilder:
    """Keeps the rows' state and builds each step's batch from it.

    Args:
        num_rows: max_num_seqs. There is one more, which the padding of CUDA graphs uses.
        max_blocks: pages of the longest sequence.
        block_size: tokens a page.
        attention: the backend that reads the cache.
        uploader: to the device of the batches.
        draws: what the sampler keeps on the device: temperature and seed of all rows.

    Attributes:
        block_tables, last_tokens: the rows' state on the device, which has all of it in `state`.
        decode_inputs: what begin_decode has written there, of max_num_seqs decodes.
        turn: which part of the page-locked memory is the step's. It is used again when the step's
            tokens have been read: RING steps are more than are ever in flight.
        begin_graphs: launch_begin of every turn as a CUDA graph; none: it is launched.
        attention_arrays: the last list of work for decodes: of listed_rows, padded to listed_size,
            and used for steps_listed steps.
    """

    def __init__(
        self,
        num_rows: int,
        max_blocks: int,
        block_size: int,
        attention: Attention,
        uploader: Uploader,
        draws: dict[str, torch.Tensor],
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
        self.state = {"block_tables": self.block_tables, "last_tokens": self.last_tokens, **draws}
        self.decode_inputs = _decode_inputs(num_rows, uploader.device)
        self.listed_rows, self.listed_size, self.steps_listed = np.empty(0), 0, 0
        self.attention_arrays: dict[str, np.ndarray] = {}
        self.turn = 0
        self.begin_graphs: list[torch.cuda.CUDAGraph] = []
        # Both sides see the same memory, as tensors and as arrays.
        pin = uploader.device.type == "cuda"
        decodes = torch.zeros(RING, 4, max(num_rows, 4), dtype=torch.int64, pin_memory=pin)
        self.decodes, self.host_decodes = decodes.unbind(), decodes.numpy()
        self.tokens = torch.empty(RING, num_rows, dtype=torch.int64, pin_memory=pin)
        self.host_tokens = self.tokens.numpy()

    def build(self, step: StepInput) -> tuple[ForwardBatch, dict[str, torch.Tensor]]:
        """The step's batch, in new memory, and all tensors that it was made of: sampled_rows among
        them, [n] int64."""
        self._take_turn(step)
        self._upload_tables(step)
        self.steps_listed = 0  # rows that start may be those of sequences that have ended
        tensors = self.uploader.upload(self._arrays(step))
        n = step.num_decodes
        token_ids = torch.cat((self.last_tokens[tensors["rows"][:n]], tensors["known_tokens"]))
        tensors["token_ids"] = token_ids
        return self._batch(tensors, int(step.query_lens.max()), n), tensors

    def begin_decode(self, step: StepInput, size: int) -> dict[str, np.ndarray]:
        """Put the inputs of a step of decodes on the GPU, padded to a size; decode_batch is made of
        them. What its attention needs is still to be uploaded; size and names decide about shapes.

        Returns: the same arrays as for the step before, if they still serve.
        """
        assert not step.starts and not step.chunks
        self._take_turn(step)
        rows, positions, n = step.decode_rows, step.decode_positions, step.num_decodes
        if not (
            0 < self.steps_listed < self.attention.steps_per_list
            and size == self.listed_size
            and n == len(self.listed_rows)
            and (rows == self.listed_rows).all()
        ):
            ones, query_start = np.ones(n, np.int64), np.arange(n + 1)
            self.attention_arrays = self.attention.host_arrays(
                self.host_tables, rows, query_start, ones, positions + 1, n, size
            )
            self.listed_rows, self.listed_size, self.steps_listed = rows, size, 0
        host = self.host_decodes[self.turn]
        host[0, :4] = n, size, self.turn, self.steps_listed
        host[1, :n], host[2, :n], host[3, :n] = rows, positions, step.decode_pages
        if self.begin_graphs:
            self.begin_graphs[self.turn].replay()
        else:
            self.launch_begin(self.turn)
        self.steps_listed += 1
        return self.attention_arrays

    def capture_begin(self, graphs: DecodeGraphs) -> None:
        """Replay a graph of a single kernel from now on: Triton takes many times as long to launch
        one. It has run before."""
        for turn in range(RING):
            graph, _ = graphs.record(partial(self.launch_begin, turn))
            self.begin_graphs.append(graph)

    def launch_begin(self, turn: int) -> None:
        ops.begin_decode(self.decodes[turn], self.state, self.decode_inputs, self.block_size)

    def decode_batch(
        self, size: int, attention_tensors: dict[str, torch.Tensor]
    ) -> tuple[ForwardBatch, dict[str, torch.Tensor]]:
        """The batch after begin_decode, and all tensors that it is made of. It asks nothing of the
        host: a CUDA graph can hold it."""
        tensors = dict(attention_tensors)
        tensors |= {name: tensor[:size] for name, tensor in self.decode_inputs.items()}
        tensors["query_start"] = self.decode_inputs["query_start"][: size + 1]
        return self._batch(tensors, max_query_len=1, num_decodes=size), tensors

    def _arrays(self, step: StepInput) -> dict[str, np.ndarray]:
        """What the step's batch is made of, for the device."""
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
            "turn": np.array([self.turn], np.int32),
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

    def _batch(
        self, tensors: dict[str, torch.Tensor], max_query_len: int, num_decodes: int
    ) -> ForwardBatch:
        return ForwardBatch(
            token_ids=tensors["token_ids"],
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

    def keep_sampled(self, rows: torch.Tensor, token_ids: torch.Tensor, turn: torch.Tensor) -> None:
        """Remember the sampled tokens: the rows' next decodes feed on them, and the engine.

        Args:
            turn: [1] int32, of the step's tensors.
        """
        ops.keep_sampled(self.last_tokens, self.tokens, rows, token_ids, turn)

    def sampled(self, num_sampled: int) -> np.ndarray:
        """Where the step's sampled tokens will be, [num_sampled] int64."""
        return self.host_tokens[self.turn, :num_sampled]

    def _slots(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where keys and values of these tokens lie."""
        index, offset = np.divmod(positions, self.block_size)
        return self.host_tables[rows, index] * np.int64(self.block_size) + offset

    def _take_turn(self, step: StepInput) -> None:
        """What every step begins with: its turn, and the host's tables up to date."""
        self.turn = (self.turn + 1) % RING
        for start in step.starts:
            self.num_cached_tokens[start.row] = start.num_cached_tokens
            self.host_tables[start.row] = 0
            self.host_tables[start.row, : len(start.block_table)] = start.block_table
        if (step.decode_pages >= 0).any():
            rows, indices, pages = self._opened(step)
            self.host_tables[rows, indices] = pages

    def _upload_tables(self, step: StepInput) -> None:
        """The same for the device's."""
        if self.block_tables.device.type == "cpu":
            return
        num_pages = max((len(start.block_table) for start in step.starts), default=0)
        if num_pages:
            # Behind these, rows keep the pages of their former sequences: no kernel reads there.
            rows = np.array([start.row for start in step.starts])
            new = self.uploader.upload({"rows": rows, "tables": self.host_tables[rows, :num_pages]})
            self.block_tables[new["rows"], :num_pages] = new["tables"]
        rows, indices, pages = self._opened(step)
        if len(pages):
            places = rows * self.host_tables.shape[1] + indices
            new = self.uploader.upload({"places": places, "pages": pages})
            self.block_tables.view(-1)[new["places"]] = new["pages"]

    def _opened(self, step: StepInput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pages that decodes open: rows, indices in their tables, pages."""
        opening = np.flatnonzero(step.decode_pages >= 0)
        indices = step.decode_positions[opening] // self.block_size
        return step.decode_rows[opening], indices, step.decode_pages[opening]


def _decode_inputs(size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Memory for triton_rows.begin_decode."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return {
        "rows": zeros(size),
        "positions": zeros(size),
        "slot_mapping": zeros(size),
        "token_ids": zeros(size),
        "context_lens": zeros(size, dtype=torch.int32),
        "query_start": torch.arange(size + 1, dtype=torch.int32, device=device),
        "temperature": zeros(size, dtype=torch.float32),
        "noise_keys": zeros(size, 2),
        "turn": zeros(1, dtype=torch.int32),
        "list_age": zeros(1, dtype=torch.int32),
    }
