"""CUDA graphs of the decode step: forward, LM head and sampling, recorded once for each of some
batch sizes and replayed with a single launch.

model_runner.py makes them and decides when one is used. A batch of a size in between is padded;
what differs from step to step is data in memory that the graph reads.
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm import platform
from nanovllm.worker.upload import Uploader, layout


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a decode step leaves on the device, padding rows last.

    Attributes:
        rows: [size] int64, of the row state.
        hidden: [size, hidden].
        token_ids: [size] int64, drawn by temperature alone.
    """

    rows: torch.Tensor
    hidden: torch.Tensor
    token_ids: torch.Tensor


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to capture, ascending, max_num_seqs the last: so far apart that few graphs
    are needed, and so close that padding costs little. Up to 64 rows a product takes as long as its
    weight is read; from there its tiles are as wide as the steps, a quarter of a power of two."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 3))
    return [*sizes, max_num_seqs]


Decode = Callable[[dict[str, torch.Tensor]], DecodeOutput]
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, the memory on the device that it reads and where in it each array lies, and what it
    leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    offsets: dict[str, int]
    output: DecodeOutput


class DecodeGraphs:
    """The graphs of one model, cache and row state: one for each size, and one more for each size
    at which decodes turn out to share a prefix.

    Args:
        sizes: batch sizes, ascending.
        uploader: to the device.
    """

    def __init__(self, sizes: list[int], uploader: Uploader):
        self.sizes = sizes
        self.uploader = uploader
        self.graphs: dict[Shapes, Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(uploader.device)

    def padded_size(self, num_decodes: int) -> int:
        """The smallest captured size for a batch."""
        return self.sizes[bisect_left(self.sizes, num_decodes)]

    def run(self, arrays: dict[str, np.ndarray], decode: Decode) -> DecodeOutput:
        """Run a step by the graph for arrays of these shapes, which is captured after the first
        such step. The output is overwritten by the next one.

        Args:
            arrays: what is uploaded for the step.
            decode: the step itself, on uploaded tensors; operations on the device alone.
        """
        captured = self.graphs.get(_shapes(arrays))
        if captured is None:
            return self.capture(arrays, decode, warm_up=decode)
        self.uploader.copy(arrays, captured.offsets, captured.inputs)
        captured.graph.replay()
        return captured.output

    def capture(
        self, arrays: dict[str, np.ndarray], decode: Decode, warm_up: Decode
    ) -> DecodeOutput:
        """Capture the graph for arrays of these shapes. Returns what warm_up does, which has run
        all kernels of `decode` on them: they are compiled and loaded outside of the capture."""
        offsets, num_bytes = layout(arrays)
        inputs = torch.empty(num_bytes, dtype=torch.uint8, device=self.uploader.device)
        tensors = self.uploader.upload(arrays, out=inputs)
        warmed = warm_up(tensors)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        platform.drop_workspaces()
        try:
            with torch.cuda.stream(self.stream):
                try:
                    graph.capture_begin(self.pool, capture_error_mode="thread_local")
                    output = decode(tensors)
                except BaseException:
                    with suppress(RuntimeError):  # it would hide what was wrong
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            platform.drop_workspaces()
        self.graphs[_shapes(arrays)] = Captured(graph, inputs, offsets, output)
        return warmed


def _shapes(arrays: dict[str, np.ndarray]) -> Shapes:
    return tuple((name, array.shape) for name, array in arrays.items())
