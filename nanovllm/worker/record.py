"""A step in flight: the host's memory for what it reads and writes, and what it gives.

The runner takes one for each step; the engine reads it as a PendingStep.
"""

import numpy as np
import torch

from nanovllm.core.step import StepOutput
from nanovllm.ops.batch import StepColumns
from nanovllm.outputs import LogprobLines

NUM_RECORDS = 4  # more than the engine has steps in flight
ALIGNMENT = 16  # bytes; kernels are compiled for pointers of this alignment
NOTHING_ALLOWED = (
    "no token is allowed next: allowed_token_ids, bad_words, logit_bias, min_tokens or "
    "logits_processors forbid all"
)
ROOM = 2**20  # bytes of an upload buffer at first: growing takes long, and may wait for the device


class StepRecord:
    """One step in flight. Its memory is used again by a later step, once this one has ended.

    Args:
        slot: the record's number.
        columns: memory for the host's columns, pinned for a GPU.
        token_ids: [max_num_seqs] int64, where the step's sampled tokens will be.
        is_blocked: [max_num_seqs] bool, pinned for a GPU; see `block`.
        device: where the step runs.

    Attributes:
        arrays: the memory of `columns` as arrays.
        num_tokens, num_sampled: query tokens and sampled tokens, without padding.
        logprobs, scores, errors: as in StepOutput.
        logprob_memory: for logprobs.py, which makes it.
        graph_size: tokens of the CUDA graph that the step replayed; None: it replayed none.
    """

    def __init__(
        self,
        slot: int,
        columns: StepColumns,
        token_ids: np.ndarray,
        is_blocked: torch.Tensor,
        device: torch.device,
    ):
        self.is_blocked = is_blocked
        self.slot, self.columns, self.token_ids, self.device = slot, columns, token_ids, device
        self.arrays = StepColumns(*(column.numpy() for column in columns))
        self.logprob_memory = torch.empty(0)
        self.event = torch.cuda.Event() if device.type == "cuda" else None
        self.buffers = [torch.empty(0, dtype=torch.uint8)]
        self.begin()

    def begin(self) -> None:
        """A new step takes the memory, when the device has ended the former one."""
        self.wait()
        self.num_tokens, self.num_sampled, self.used = 0, 0, 0
        self.logprobs: LogprobLines | None = None
        self.scores: LogprobLines | None = None
        self.errors: dict[int, BaseException] = {}
        self.may_be_blocked: list[int] = []
        self.graph_size: int | None = None
        del self.buffers[:-1]  # the last one is the largest

    def end(self) -> None:
        """All that the step does has been launched."""
        if self.event is not None:
            self.event.record()

    def wait(self) -> None:
        """Wait for the device to end the step."""
        if self.event is not None:
            self.event.synchronize()  # does not wait if the event was never recorded

    def block(self, indices: np.ndarray, is_blocked: torch.Tensor) -> None:
        """Of these sampled tokens some may be worth nothing, as all tokens were forbidden: [n] bool
        on the device, which the host reads with the tokens."""
        first = len(self.may_be_blocked)
        self.may_be_blocked += indices.tolist()
        end = len(self.may_be_blocked)
        self.is_blocked[first:end].copy_(is_blocked, non_blocking=True)

    def _read_blocked(self) -> None:
        for i, is_blocked in zip(self.may_be_blocked, self.is_blocked.tolist(), strict=False):
            if is_blocked:
                self.errors.setdefault(i, ValueError(NOTHING_ALLOWED))

    def result(self) -> StepOutput:
        self.wait()
        if self.may_be_blocked:
            self._read_blocked()
        token_ids = self.token_ids[: self.num_sampled].tolist()
        return StepOutput(token_ids, self.logprobs, self.scores, self.errors)

    def upload(
        self, arrays: dict[str, np.ndarray], out: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of the arrays' names, shapes and dtypes on the device, by one copy for which the
        host does not wait. On a CPU they share the arrays' memory.

        Args:
            out: uint8 memory on the device to put them in, for a CUDA graph that reads them there:
                arrays of equal shapes come to lie in equal places. None: new memory.
        """
        if self.event is None:
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        offsets, size = layout(arrays)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.copy(arrays, offsets, out[:size])
        return views(out, arrays, offsets)

    def copy(
        self, arrays: dict[str, np.ndarray], offsets: dict[str, int], out: torch.Tensor
    ) -> None:
        """The arrays into memory on a GPU, at the offsets that `layout` gives."""
        size = len(out)
        if self.used + size > len(self.buffers[-1]):
            room = max(ROOM, len(self.buffers[-1]), 1 << (size - 1).bit_length())
            self.buffers.append(torch.empty(room, dtype=torch.uint8, pin_memory=True))
            self.used = 0
        host = self.buffers[-1][self.used : self.used + size]
        self.used += size
        pack(arrays, offsets, host.numpy())
        out.copy_(host, non_blocking=True)


def make_records(
    max_num_seqs: int, num_groups: int, max_tokens: int, device: torch.device
) -> tuple[list[StepRecord], torch.Tensor]:
    """The records of a runner, and all their token_ids, [slots, max_num_seqs], as keep_sampled
    takes them.

    Args:
        max_tokens: query tokens of a step.
    """
    pin = device.type == "cuda"
    width = -(-max_tokens // 4) * 4  # all columns aligned
    token_ids = torch.zeros(NUM_RECORDS, max_num_seqs, dtype=torch.int64, pin_memory=pin)
    is_blocked = torch.zeros(NUM_RECORDS, max_num_seqs, dtype=torch.bool, pin_memory=pin)
    records = []
    for slot in range(NUM_RECORDS):
        memory = torch.zeros(5 + num_groups, width, dtype=torch.int32, pin_memory=pin)
        counts = torch.zeros(6, dtype=torch.int32, pin_memory=pin)
        row, position, token, sampled, stored, *_ = memory
        columns = StepColumns(counts, row, position, token, sampled, stored, memory[5:])
        own = columns, token_ids[slot].numpy(), is_blocked[slot]
        records.append(StepRecord(slot, *own, device))
    return records, token_ids


def layout(arrays: dict[str, np.ndarray]) -> tuple[dict[str, int], int]:
    """Where each array lies in a packed buffer, and the buffer's size in bytes."""
    offsets, size = {}, 0
    for name, array in arrays.items():
        offsets[name] = size
        size += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, size


def pack(arrays: dict[str, np.ndarray], offsets: dict[str, int], buffer: np.ndarray) -> None:
    """Copy arrays into a buffer of bytes. (numpy's views would cost more than the copies.)"""
    memory = buffer.data
    for name, array in arrays.items():
        if array.size:
            source = np.ascontiguousarray(array).data.cast("B")
            memory[offsets[name] : offsets[name] + len(source)] = source


def views(
    buffer: torch.Tensor, arrays: dict[str, np.ndarray], offsets: dict[str, int]
) -> dict[str, torch.Tensor]:
    """Tensors like the arrays, over a packed buffer."""
    tensors = {}
    for name, array in arrays.items():
        part = buffer[offsets[name] : offsets[name] + array.nbytes]
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        tensors[name] = part.view(dtype).view(array.shape)
    return tensors
