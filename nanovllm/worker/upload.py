"""Host arrays of a step -> tensors on the device, in one copy that nobody waits for."""

import numpy as np
import torch

from nanovllm import ops

ALIGNMENT = 16  # bytes; kernels are compiled for pointers that are aligned so
RING = 16  # turns until page-locked memory is used again: more than two steps take
ROOM = 2**20  # bytes of a buffer at first: growing takes long, and may wait for the device


class Uploader:
    """Packs arrays into one buffer and copies it.

    The host side of a copy must not change before it has been read; a ring of page-locked buffers
    and an event for each see to that. On a CPU the tensors share the arrays' memory.

    Args:
        device: where the tensors go.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.buffers: list[torch.Tensor] = [torch.empty(0, dtype=torch.uint8)] * RING
        self.read = [torch.cuda.Event() for _ in range(RING)] if device.type == "cuda" else []
        self.turn = 0

    def upload(
        self, arrays: dict[str, np.ndarray], out: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Tensors of the arrays' names, shapes and dtypes.

        Args:
            out: uint8 memory on the device to put them in, for a CUDA graph that reads them there:
                arrays of equal shapes come to lie in equal places. None: new memory.
        """
        if self.device.type == "cpu":
            return {name: torch.from_numpy(array) for name, array in arrays.items()}
        offsets, size = layout(arrays)
        if out is None:
            out = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.copy(arrays, offsets, out[:size])
        return views(out, arrays, offsets)

    def copy(
        self, arrays: dict[str, np.ndarray], offsets: dict[str, int], out: torch.Tensor
    ) -> None:
        """The arrays into memory on a GPU, where `layout` says; for those who know it already."""
        size = len(out)
        self.turn = (self.turn + 1) % RING
        self.read[self.turn].synchronize()  # does not wait if it was never recorded
        if len(self.buffers[self.turn]) < size:
            room = max(ROOM, 1 << (size - 1).bit_length())
            self.buffers[self.turn] = torch.empty(room, dtype=torch.uint8, pin_memory=True)
        host = self.buffers[self.turn][:size]
        pack(arrays, offsets, host.numpy())
        try:
            ops.copy_pinned(out, host)
        finally:  # after an interrupt too: it may have been launched
            self.read[self.turn].record()


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
