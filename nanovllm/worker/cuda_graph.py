"""CUDA graphs of the decode step: forward, LM head and sampling, recorded once for each of some
batch sizes and replayed with a single launch.

model_runner.py makes them and decides when one is used. A batch of a size in between is padded;
what differs from step to step is data in memory that the graph reads.
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from nanovllm import platform
from nanovllm.worker.upload import Uploader, layout


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What a decode step leaves on the device, padding rows last. Its tokens, drawn by temperature
    alone, are in the rows' state and at the host already.

    Attributes:
        logits: [size, vocab], which the next step overwrites.
        rows, turn: as keep_sampled takes them, for who draws others.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    turn: torch.Tensor


def graph_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to capture, ascending, max_num_seqs the last: so far apart that few graphs
    are needed, and so close that padding costs little. Up to 64 rows a product takes as long as its
    weight is read; from there its tiles are as wide as the steps, a quarter of a power of two."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 3))
    return [*sizes, max_num_seqs]


Result = TypeVar("Result")
# A step of so many decodes, padding included, on what its attention needs.
Decode = Callable[[int, dict[str, torch.Tensor]], DecodeOutput]


@dataclass(slots=True)
class Captured:
    """A graph, the memory on the device that its attention reads, where in it each array lies and
    which arrays are there, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    memory: torch.Tensor
    offsets: dict[str, int]
    arrays: dict[str, np.ndarray]
    output: DecodeOutput


class DecodeGraphs:
    """The graphs of one model, cache and row state: one for each size, and one more for each size
    at which decodes turn out to share a prefix, or a few to have long contexts.

    Args:
        sizes: batch sizes, ascending.
        uploader: to the device.
    """

    def __init__(self, sizes: list[int], uploader: Uploader):
        self.sizes = sizes
        self.uploader = uploader
        self.graphs: dict[tuple[int, tuple[str, ...]], Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(uploader.device)

    def padded_size(self, num_decodes: int) -> int:
        """The smallest captured size for a batch."""
        return self.sizes[bisect_left(self.sizes, num_decodes)]

    def run(self, size: int, arrays: dict[str, np.ndarray], decode: Decode) -> DecodeOutput:
        """Run a step by the graph for its size and such arrays, which is captured after the first
        such step. The output is overwritten by the next one.

        Args:
            arrays: what the step's attention needs; uploaded unless they are the last ones.
            decode: the step itself; operations on the device alone.
        """
        captured = self.graphs.get((size, tuple(arrays)))
        if captured is None:
            return self.capture(size, arrays, decode, warm_up=decode)
        if captured.arrays is not arrays:
            self.uploader.copy(arrays, captured.offsets, captured.memory)
            captured.arrays = arrays
        captured.graph.replay()
        return captured.output

    def capture(
        self, size: int, arrays: dict[str, np.ndarray], decode: Decode, warm_up: Decode
    ) -> DecodeOutput:
        """Capture the graph for a size and such arrays. Returns what warm_up does, which has run
        all kernels of `decode` on them: they are compiled and loaded outside of the capture."""
        offsets, num_bytes = layout(arrays)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.uploader.device)
        tensors = self.uploader.upload(arrays, out=memory)
        warmed = warm_up(size, tensors)
        graph, output = self.record(partial(decode, size, tensors))
        self.graphs[size, tuple(arrays)] = Captured(graph, memory, offsets, arrays, output)
        return warmed

    def record(self, operations: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of operations whose kernels have run before, and what they return."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.current_stream().synchronize()
        platform.drop_workspaces()
        try:
            with torch.cuda.stream(self.stream):
                try:
                    graph.capture_begin(self.pool, capture_error_mode="thread_local")
                    result = operations()
                except BaseException:
                    with suppress(RuntimeError):  # it would hide what was wrong
                        graph.capture_end()
                    raise
                graph.capture_end()
        finally:
            platform.drop_workspaces()
        return graph, result
