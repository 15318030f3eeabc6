"""CUDA graphs of a step: forward, LM head and sampling, recorded once for each of some numbers of
tokens and replayed with a single launch.

model_runner.py makes them and decides when one is used. A step of a size in between is padded; what
differs from step to step, prompts or decodes too, is data in memory that the graph reads.
"""

from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from nanovllm.ops import platform
from nanovllm.worker.upload import Uploader, layout

MIXED_SIZES = [128, 256, 512]  # for steps with prompts, where there are few rows


@dataclass(frozen=True, slots=True)
class GraphOutput:
    """What a step leaves on the device, n tokens that are drawn from or might be, padding last; the
    next step overwrites it. What is drawn by temperature alone is in the rows' state and at the
    host already.

    Attributes:
        logits: [n, vocab].
        rows, turn: as keep_sampled takes them, for who draws others.
    """

    logits: torch.Tensor
    rows: torch.Tensor
    turn: torch.Tensor


def graph_sizes(
    max_num_seqs: int, least_mixed: int | None = None, max_tokens: int = 0
) -> list[int]:
    """The sizes to capture, ascending: so far apart that few graphs are needed, and so close that
    padding costs little. Up to 64 rows a product takes as long as its weight is read; from there
    its tiles are as wide as the steps, a quarter of a power of two. Beyond max_num_seqs there are
    up to four for prompts, the largest of twice as many tokens or of 512.

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
# A step of so many tokens, padding included, on what its attention needs.
Step = Callable[[int, dict[str, torch.Tensor]], GraphOutput]


@dataclass(slots=True)
class Captured:
    """A graph, the memory on the device that its attention reads, where in it each array lies and
    which arrays are there, and what it leaves."""

    graph: torch.cuda.CUDAGraph
    memory: torch.Tensor
    offsets: dict[str, int]
    arrays: dict[str, np.ndarray]
    output: GraphOutput


class StepGraphs:
    """The graphs of one model, cache and row state: one for each size, and one more for each other
    choice of attention's launches (its arrays' names) that a step of the size turns out to need.

    Args:
        sizes: numbers of tokens, ascending.
        uploader: to the device.
    """

    def __init__(self, sizes: list[int], uploader: Uploader):
        self.sizes = sizes
        self.uploader = uploader
        self.graphs: dict[tuple[int, tuple[str, ...]], Captured] = {}
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(uploader.device)

    def padded_size(self, num_tokens: int) -> int | None:
        """The smallest captured size for so many; None: they are too many."""
        i = bisect_left(self.sizes, num_tokens)
        return self.sizes[i] if i < len(self.sizes) else None

    def run(self, size: int, arrays: dict[str, np.ndarray], step: Step) -> GraphOutput:
        """Run a step by the graph for its size and such arrays, which is captured after the first
        such step. The output is overwritten by the next one.

        Args:
            arrays: what the step's attention needs; uploaded unless they are the last ones.
            step: the step itself; operations on the device alone.
        """
        captured = self.graphs.get((size, tuple(arrays)))
        if captured is None:
            return self.capture(size, arrays, step, warm_up=step)
        if captured.arrays is not arrays:
            self.uploader.copy(arrays, captured.offsets, captured.memory)
            captured.arrays = arrays
        captured.graph.replay()
        return captured.output

    def capture(
        self, size: int, arrays: dict[str, np.ndarray], step: Step, warm_up: Step
    ) -> GraphOutput:
        """Capture the graph for a size and such arrays. Returns what warm_up does, which has run
        all kernels of `step` on them: they are compiled and loaded outside of the capture."""
        offsets, num_bytes = layout(arrays)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.uploader.device)
        tensors = self.uploader.upload(arrays, out=memory)
        warmed = warm_up(size, tensors)
        graph, output = self.record(partial(step, size, tensors))
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
