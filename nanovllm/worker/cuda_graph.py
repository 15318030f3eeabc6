"""CUDA graphs of the decode step: forward, LM head and sampling, recorded once for each of some
batch sizes and replayed with a single launch.

model_runner.py makes them and decides when one is used. A batch of a size in between is padded;
what differs from step to step is data in a buffer that the graphs read.
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
    """The batch sizes to capture, ascending, max_num_seqs the last: so far apart that few decodes
    are padding and few graphs are needed."""
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else 8 if size < 64 else 2 ** (size.bit_length() - 4)
    return [*sizes, max_num_seqs]


class DecodeGraphs:
    """The graphs of one model, cache and row state.

    Args:
        sizes: batch sizes, ascending.
        make_arrays: what is uploaded for a harmless step, by size; shapes depend on the size alone.
        decode: the step itself, on uploaded tensors; operations on the device alone.
        uploader: to the device.
    """

    def __init__(
        self,
        sizes: list[int],
        make_arrays: Callable[[int], dict[str, np.ndarray]],
        decode: Callable[[dict[str, torch.Tensor]], DecodeOutput],
        uploader: Uploader,
    ):
        self.sizes = sizes
        self.uploader = uploader
        self.layouts = {size: layout(make_arrays(size)) for size in sizes}
        _, num_bytes = self.layouts[sizes[-1]]
        self.inputs = torch.empty(num_bytes, dtype=torch.uint8, device=uploader.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, DecodeOutput]] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(uploader.device)
        # The largest first: the others find room in its memory.
        for size in reversed(sizes):
            tensors = uploader.upload(make_arrays(size), out=self.inputs)
            decode(tensors)  # kernels are compiled and loaded outside of the capture
            graph = torch.cuda.CUDAGraph()
            torch.cuda.current_stream().synchronize()
            platform.drop_workspaces()
            with torch.cuda.stream(stream):
                graph.capture_begin(pool, capture_error_mode="thread_local")
                try:
                    output = decode(tensors)
                except BaseException:
                    with suppress(RuntimeError):  # it would hide what was wrong
                        graph.capture_end()
                    raise
                graph.capture_end()
            self.graphs[size] = graph, output
        platform.drop_workspaces()

    def padded_size(self, num_decodes: int) -> int:
        """The smallest captured size for a batch."""
        return self.sizes[bisect_left(self.sizes, num_decodes)]

    def replay(self, size: int, arrays: dict[str, np.ndarray]) -> DecodeOutput:
        """Run the graph of a size on what make_arrays would make of a step. The output is
        overwritten by the next replay."""
        offsets, num_bytes = self.layouts[size]
        self.uploader.copy(arrays, offsets, self.inputs[:num_bytes])
        graph, output = self.graphs[size]
        graph.replay()
        return output
