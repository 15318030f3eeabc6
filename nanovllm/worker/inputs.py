"""StepInput -> ForwardBatch: the rows' state (block tables, last sampled tokens) turned into what a
forward sees.

model_runner.py calls it once a step, and gives it the sampled tokens back. On a GPU a kernel makes
the inputs of most steps from the rows' state; every token is a row of its own then, as a CUDA graph
needs. Where decodes are the same as in the step before, the attention's list of work serves on.
Other steps are built on the host, in numpy.
"""

from functools import partial

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.ops.batch import Attention, ForwardBatch
from nanovllm.worker.graphs import StepGraphs
from nanovllm.worker.upload import RING, Uploader


class InputBuilder:
    """Keeps the rows' state and builds each step's batch from it.

    Args:
        num_rows: max_num_seqs. There is one more, which the padding of CUDA graphs uses.
        num_tokens: of the largest step that `begin` is called for; num_rows or more.
        max_blocks: pages of the longest sequence.
        block_size: tokens a page.
        attention: the backend that reads the cache.
        uploader: to the device of the batches.
        draws: what the sampler keeps on the device: temperature and seed of all rows.

    Attributes:
        block_tables, last_tokens: the rows' state on the device, which has all of it in `state`.
        step_inputs: what `begin` has written there, of num_tokens tokens.
        turn: which part of the page-locked memory is the step's. It is used again when the step's
            tokens have been read: RING steps are more than are ever in flight.
        begin_graphs: launch_begin of every turn as a CUDA graph; none: it is launched.
        attention_arrays: what `begin` returned last: for decodes of listed_rows, padded to
            listed_size, and used for steps_listed steps; 0: it serves no other.
    """

    def __init__(
        self,
        num_rows: int,
        num_tokens: int,
        max_blocks: int,
        block_size: int,
        attention: Attention,
        uploader: Uploader,
        draws: dict[str, torch.Tensor],
    ):
        self.block_size = block_size
        self.attention = attention
        self.uploader = uploader
        self.padding_row, self.num_tokens = num_rows, num_tokens
        self.host_tables = np.zeros((num_rows + 1, max_blocks), np.int32)
        self.num_cached_tokens = np.zeros(num_rows + 1, np.int64)
        # On a CPU the table is the host's own memory.
        self.block_tables = torch.from_numpy(self.host_tables).to(uploader.device)
        self.last_tokens = torch.zeros(num_rows + 1, dtype=torch.int64, device=uploader.device)
        self.state = {"block_tables": self.block_tables, "last_tokens": self.last_tokens, **draws}
        self.step_inputs = _step_inputs(num_tokens, uploader.device)
        self.listed_rows, self.listed_size, self.steps_listed = np.empty(0), 0, 0
        self.attention_arrays: dict[str, np.ndarray] = {}
        self.turn = 0
        self.begin_graphs: list[torch.cuda.CUDAGraph] = []
        # Both sides see the same memory, as tensors and as arrays.
        pin = uploader.device.type == "cuda"
        lines = torch.zeros(RING, 5, max(num_tokens, 4), dtype=torch.int64, pin_memory=pin)
        self.lines, self.host_lines = lines.unbind(), lines.numpy()
        self.tokens = torch.empty(RING, num_tokens, dtype=torch.int64, pin_memory=pin)
        self.host_tokens = self.tokens.numpy()

    def build(self, step: StepInput) -> tuple[ForwardBatch, dict[str, torch.Tensor]]:
        """The step's batch, in new memory, and all tensors that it was made of: sampled_rows among
        them, [n] int64."""
        self._take_turn(step)
        self._upload_starts(step)
        self._upload_opened(step)
        self.steps_listed = 0  # rows that start may be those of sequences that have ended
        tensors = self.uploader.upload(self._arrays(step))
        n = step.num_decodes
        token_ids = torch.cat((self.last_tokens[tensors["rows"][:n]], tensors["known_tokens"]))
        tensors["token_ids"] = token_ids
        return self._batch(tensors, int(step.query_lens.max()), n), tensors

    def begin(self, step: StepInput, size: int) -> dict[str, np.ndarray]:
        """Put the inputs of a step on the GPU, padded to so many tokens; batch_of is made of them.

        Returns: what is still to be uploaded, the same arrays as for the step before if they serve
        on: attention's, and, if there are more tokens than rows, which are drawn from. Size and
        names decide about shapes.
        """
        self._take_turn(step)
        self._upload_starts(step)
        rows, positions, n = step.decode_rows, step.decode_positions, step.num_decodes
        if step.chunks or not (
            0 < self.steps_listed < self.attention.steps_per_list
            and size == self.listed_size
            and n == len(self.listed_rows)
            and (rows == self.listed_rows).all()
        ):
            self.attention_arrays = self._attention_arrays(step, size)
            if size > self.padding_row:
                self.attention_arrays["sampled_tokens"] = self._padded_samples(step, size)
            self.listed_rows, self.listed_size, self.steps_listed = rows, size, 0
        host = self.host_lines[self.turn]
        host[1, :n], host[2, :n], host[3, :n], host[4, :n] = (
            rows,
            positions,
            step.decode_blocks[0],
            -1,
        )
        if step.chunks:
            n = self._add_chunks(step, host)
        host[0, :4] = n, size, self.turn, self.steps_listed
        if self.begin_graphs:
            self.begin_graphs[self.turn].replay()
        else:
            self.launch_begin(self.turn)
        self.steps_listed = 0 if step.chunks else self.steps_listed + 1
        return self.attention_arrays

    def capture_begin(self, graphs: StepGraphs) -> None:
        """Replay a graph of a single kernel from now on: Triton takes many times as long to launch
        one. It has run before."""
        for turn in range(RING):
            graph, _ = graphs.record(partial(self.launch_begin, turn))
            self.begin_graphs.append(graph)

    def launch_begin(self, turn: int) -> None:
        ops.begin_step(self.lines[turn], self.state, self.step_inputs, self.block_size)

    def batch_of(
        self, size: int, attention_tensors: dict[str, torch.Tensor]
    ) -> tuple[ForwardBatch, dict[str, torch.Tensor]]:
        """The batch after `begin`, every token by itself, and all tensors that it is made of. It
        asks nothing of the host: a CUDA graph can hold it."""
        tensors = dict(attention_tensors)
        tensors |= {name: tensor[:size] for name, tensor in self.step_inputs.items()}
        tensors["query_start"] = self.step_inputs["query_start"][: size + 1]
        return self._batch(tensors, max_query_len=1, num_decodes=size), tensors

    def _arrays(self, step: StepInput) -> dict[str, np.ndarray]:
        """What the step's batch is made of, for the device."""
        rows, query_lens, first_positions = step.rows, step.query_lens, step.positions
        query_start = np.concatenate(([0], query_lens.cumsum()))
        token_rows, positions = _tokens(rows, first_positions, query_lens)
        slots = self._slots(token_rows, positions)
        slots[positions < self.num_cached_tokens[token_rows]] = -1
        return {
            "rows": rows,
            "positions": positions,
            "slot_mapping": slots,
            "query_start": query_start.astype(np.int32),
            "context_lens": (first_positions + query_lens).astype(np.int32),
            "known_tokens": step.known_tokens,
            "logits_indices": step.sampled_tokens,
            "sampled_rows": rows[step.samples],
            "turn": np.array([self.turn], np.int32),
            **self._attention_arrays(step, None),
        }

    def _attention_arrays(self, step: StepInput, size: int | None) -> dict[str, np.ndarray]:
        query_lens = step.query_lens
        return self.attention.host_arrays(
            self.host_tables,
            step.rows,
            np.concatenate(([0], query_lens.cumsum())),
            query_lens,
            step.positions + query_lens,
            step.num_decodes,
            size,
        )

    def _add_chunks(self, step: StepInput, lines: np.ndarray) -> int:
        """The tokens of chunks to what ops.begin_step reads, behind those of the decodes. Returns
        how many there are in all."""
        first = step.num_decodes
        seqs = slice(first, None)
        rows, positions = _tokens(step.rows[seqs], step.positions[seqs], step.query_lens[seqs])
        end = first + len(rows)
        lines[1, first:end], lines[2, first:end] = ~rows, positions
        lines[1, step.sampled_tokens[first:]] = step.rows[seqs][step.samples[seqs]]
        lines[3, first:end] = np.where(positions < self.num_cached_tokens[rows], -2, -1)
        lines[4, first:end] = step.known_tokens
        return end

    def _padded_samples(self, step: StepInput, size: int) -> np.ndarray:
        """[num_rows]: the tokens that are drawn from, then, as padding, one that is not."""
        sampled = step.sampled_tokens
        others = np.full(size, True)
        others[sampled] = False
        return np.append(sampled, np.full(self.padding_row - len(sampled), others.argmax()))

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

    def sampled(self) -> np.ndarray:
        """Where the step's sampled tokens will be, [num_tokens] int64."""
        return self.host_tokens[self.turn]

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
            self.host_tables[start.row, : len(start.block_tables[0])] = start.block_tables[0]
        if (step.decode_blocks[0] >= 0).any():
            rows, indices, pages = self._opened(step)
            self.host_tables[rows, indices] = pages

    def _upload_starts(self, step: StepInput) -> None:
        """The same for the device's, of rows that start."""
        num_pages = max((len(start.block_tables[0]) for start in step.starts), default=0)
        if num_pages and self.block_tables.device.type != "cpu":
            # Behind these, rows keep the pages of their former sequences: no kernel reads there.
            rows = np.array([start.row for start in step.starts])
            new = self.uploader.upload({"rows": rows, "tables": self.host_tables[rows, :num_pages]})
            self.block_tables[new["rows"], :num_pages] = new["tables"]

    def _upload_opened(self, step: StepInput) -> None:
        """And of decodes that open pages, as `begin` does."""
        rows, indices, pages = self._opened(step)
        if len(pages) and self.block_tables.device.type != "cpu":
            places = rows * self.host_tables.shape[1] + indices
            new = self.uploader.upload({"places": places, "pages": pages})
            self.block_tables.view(-1)[new["places"]] = new["pages"]

    def _opened(self, step: StepInput) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pages that decodes open: rows, indices in their tables, pages."""
        opening = np.flatnonzero(step.decode_blocks[0] >= 0)
        indices = step.decode_positions[opening] // self.block_size
        return step.decode_rows[opening], indices, step.decode_blocks[0][opening]


def _tokens(
    rows: np.ndarray, first_positions: np.ndarray, query_lens: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row and position of each query token of some sequences."""
    seqs = np.repeat(np.arange(len(rows)), query_lens)
    first_tokens = query_lens.cumsum() - query_lens
    return rows[seqs], np.arange(len(seqs)) + (first_positions - first_tokens)[seqs]


def _step_inputs(size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Memory for ops.begin_step."""

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
