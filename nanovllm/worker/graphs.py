"""CUDA graphs of a step: forward, LM head and sampling, recorded once for each of some numbers of
tokens and replayed with a single launch.

The runner makes them and decides when one is used. A step of a size in between is padded; what
differs from step to step, prompts or decodes too, is data in memory that the graph reads.
"""

import logging
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from nanovllm.ops import platform
from nanovllm.ops.batch import Attention
from nanovllm.worker.record import StepRecord, layout

logger = logging.getLogger(__name__)

MIXED_SIZES = [128, 256, 512]  # for steps with prompts, where there are few rows


def least_mixed_of(attentions: Sequence[Attention]) -> int | None:
    """Tokens of the smallest graph that may hold chunks, by all these backends; None: none may."""
    least = [attention.least_mixed for attention in attentions]
    return None if None in least else max(n for n in least if n is not None)


def graph_sizes(
    max_num_seqs: int, least_mixed: int | None = None, max_tokens: int = 0
) -> list[int]:
    """The sizes to capture, ascending: far enough apart that few graphs are needed, and close
    enough that padding costs little. Up to 64 rows a product takes as long as its weight is read;
    from there its tiles are as wide as the steps, a quarter of a power of two. Beyond max_num_seqs
    there are up to four for prompts, the largest of 2 * max_num_seqs tokens or of 512.

    Args:
        max_num_seqs: decodes at most.
        least_mixed, max_tokens: the fewest and the most tokens of a step with prompts; None: no
            graph is for such steps.
    """
    sizes, size = [], 1
    while size < max_num_seqs:
        sizes.append(size)
        size += size if size < 8 else max(8, 2 ** (size.bit_length() - 3))
    larger = MIXED_SIZES
    if 2 * max_num_seqs >= larger[-1]:
        larger = [-(-max_num_seqs * quarters // 32) * 8 for quarters in (5, 6, 7, 8)]
    larger = sorted({min(size, max_tokens) for size in larger})
    if least_mixed is None or larger[-1] < least_mixed:
        return [*sizes, max_num_seqs]
    least = max(max_num_seqs + 1, least_mixed)
    return [*sizes, max_num_seqs, *(size for size in larger if size >= least)]


Result = TypeVar("Result")
# A step of some shape (inputs.StepShape), on what its attention needs.
Step = Callable[[Any, dict[str, torch.Tensor]], Result]


@dataclass(slots=True)
class Captured:
    """A graph.

    Attributes:
        memory: what its attention reads, on the device.
        offsets: where each array lies in it.
        arrays: the arrays that lie there now.
        output: what the step returned, which each replay writes again.
    """

    graph: torch.cuda.CUDAGraph
    memory: torch.Tensor
    offsets: dict[str, int]
    arrays: dict[str, np.ndarray]
    output: Any


class StepGraphs:
    """The graphs of one model, cache and row state: one for each shape, and one more for each other
    choice of attention's launches (its arrays' names) that a step of the shape turns out to need.

    Args:
        sizes: numbers of tokens, ascending.
        device: a GPU.
    """

    def __init__(self, sizes: list[int], device: torch.device):
        self.sizes, self.device = sizes, device
        self.graphs: dict[tuple[Any, tuple[str, ...]], Captured | None] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def padded_size(self, num_tokens: int) -> int | None:
        """The smallest captured size >= num_tokens, or None."""
        i = bisect_left(self.sizes, num_tokens)
        return self.sizes[i] if i < len(self.sizes) else None

    def run(
        self,
        shape: Any,
        arrays: dict[str, np.ndarray],
        record: StepRecord,
        step: Step[Result],
    ) -> Result:
        """Run a step by the graph for its shape and arrays, which is captured after the first such
        step. Where memory is too small for it, its steps are launched kernel by kernel. The output
        is overwritten by the next one.

        Args:
            arrays: what the step's attention needs; uploaded unless they are the last ones.
            step: the step itself; operations on the device alone.
        """
        key = shape, tuple(arrays)
        if key not in self.graphs:
            try:
                return self.capture(shape, arrays, record, step, warm_up=step)
            except torch.OutOfMemoryError as error:
                logger.warning("no memory for a CUDA graph of %s: %s", shape, error)
                self.graphs[key] = None
        captured = self.graphs[key]
        if captured is None:  # a step once more does the same
            return step(shape, record.upload(arrays))
        if captured.arrays is not arrays:
            record.copy(arrays, captured.offsets, captured.memory)
            captured.arrays = arrays
        captured.graph.replay()
        return captured.output

    def capture(
        self,
        shape: Any,
        arrays: dict[str, np.ndarray],
        record: StepRecord,
        step: Step[Result],
        warm_up: Step[Result],
    ) -> Result:
        """Capture the graph for a shape and arrays. Returns what warm_up does, which has run all
        kernels of `step` on them: they are compiled and loaded outside of the capture."""
        offsets, num_bytes = layout(arrays)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        tensors = record.upload(arrays, out=memory)
        warmed = warm_up(shape, tensors)
        graph, output = self.trace(partial(step, shape, tensors))
        self.graphs[shape, tuple(arrays)] = Captured(graph, memory, offsets, arrays, output)
        return warmed

    def trace(self, operations: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
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
