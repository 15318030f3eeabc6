"""Has threads compile a GPU's kernels while weights are read: a start without a kernel cache takes
half the time.

worker.py calls it. ops/triton/compile_ahead.py does the compiling; steps without requests say
which kernels there are.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.metrics import Laps
from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.sampling_params import MAX_LOGPROBS, SamplingParams
from nanovllm.worker.graphs import graph_sizes
from nanovllm.worker.runner import ModelRunner
from nanovllm.worker.trial import largest_step

if TYPE_CHECKING:
    from nanovllm.ops.triton.compile_ahead import KernelCompiler


def start_compiler(device: torch.device) -> "Future[KernelCompiler] | None":
    """A compiler in the making; None on a CPU."""
    if device.type == "cpu":
        return None
    return ThreadPoolExecutor(1).submit(_make_compiler, device)


def _make_compiler(device: torch.device) -> "KernelCompiler":
    from nanovllm.ops.triton.compile_ahead import KernelCompiler

    return KernelCompiler(device)


@contextmanager
def compiled_ahead(
    starting: "Future[KernelCompiler] | None",
    make_runner: Callable[[], ModelRunner],
    max_model_len: int,
    sizes: list[int],
    laps: Laps,
) -> Iterator[None]:
    """Threads compile the kernels of all usual steps while the caller's block runs; at its end
    they are there. Kernels of odd batches follow, when the engine may be running already.

    Args:
        starting: start_compiler's; None: nothing is compiled.
        make_runner: a runner on a cache of one block, with weights that may be anything yet.
        sizes: of the CUDA graphs.
        laps: of the start.
    """
    if starting is None:
        yield
        return
    compiler = starting.result()
    try:
        runner = make_runner()
        runner.kv = runner.kv.first_layers
        compiling = _compile_kernels(compiler, runner, max_model_len, sizes)
        for attention in runner.inputs.attentions:
            attention.reset()  # some kernels were there already and have run, others not
        del runner
        laps.end("trial without kernels")
        yield
        # A full collection takes a tenth of a second, in which a GPU runs out of work: now, not in
        # one of the first batches.
        gc.collect()
        wait(compiling)
        laps.end(f"{len(compiling)} kernels")
    except BaseException:
        compiler.close(cancel=True)
        raise
    compiler.close(cancel=False)


@torch.inference_mode()
def _compile_kernels(
    compiler: "KernelCompiler", runner: ModelRunner, max_model_len: int, sizes: list[int]
) -> list[Future[None]]:
    """Hand over what the largest step launches, steps of some graphs' sizes, and decodes beside a
    chunk. Returns what to wait for before the first step."""
    from nanovllm.ops.triton.kernel_configs import MAX_GEMV_ROWS

    max_num_seqs, num_groups = runner.max_num_seqs, len(runner.inputs.attentions)
    num_tokens = len(runner.inputs.numbers)  # of the largest step

    def decode(num_decodes: int, size: int, position: int = 0) -> None:
        record = runner.take_record()
        arrays = runner.begin_decodes(num_decodes, size, record, position)
        runner.forward(runner.graph_shape(size, limited=False), record.upload(arrays))
        record.end()

    def prefill(num_seqs: int, num_tokens: int) -> None:
        runner.run(largest_step(num_seqs, num_tokens, max_model_len, num_groups))

    with compiler.instead_of_launches() as compiling:
        prefill(1, num_tokens)  # long chunks take longest
        prefill(max_num_seqs, num_tokens)
        for size in _doubling(max_num_seqs, sizes):
            decode(1, size)
            if size < max_num_seqs:
                runner.rows.state.last_tokens.zero_()  # no row has sampled any
                runner.run(_mixed_step(size, num_groups))
    with compiler.instead_of_launches():  # the start does not wait for these
        # All rows' tables are zeros: a prefix that they share, if it is long enough.
        decode(max_num_seqs, max_num_seqs, max_model_len - 1)
        for size in range(1, min(MAX_GEMV_ROWS, max_num_seqs) + 1):
            decode(1, size)
        # Other layouts of attention, where no larger batch had them compiled.
        decode(1, 1, max_model_len - 1)
        prefill(1, 1)
        assert runner.logits is not None
        logits, draws = runner.logits[:1], runner.inputs.tensors.draws
        ops.sample(logits, *(x[:1] for x in draws if x is not None))
        ops.top_logprobs(logits, runner.inputs.tensors.rows[:1], MAX_LOGPROBS)
    return compiling


def _mixed_step(num_decodes: int, num_groups: int) -> StepInput:
    """Decodes beside a chunk: they run other kernels than decodes alone."""
    rows = np.arange(num_decodes)
    blocks = np.full((num_groups, num_decodes), -1, np.int32)
    step = StepInput(decode_rows=rows, decode_positions=np.zeros_like(rows), decode_blocks=blocks)
    params, tables = SamplingParams(temperature=0.0), (np.empty(0, np.int32),) * num_groups
    step.starts.append(RowStart(num_decodes, 1, params, 0, (), 0, tables))
    step.chunks.append(Chunk(num_decodes, 0, [0], samples=True))
    return step


def _doubling(max_num_seqs: int, sizes: list[int]) -> list[int]:
    """Sizes that between them launch what all graphs do: a size that begins with other kernels
    (kernel_configs.py) is more than twice the one before. Python, which noting launches and
    compiling compete for, is what a start waits for."""
    sizes = sizes or graph_sizes(max_num_seqs)  # without graphs: of decodes
    return [n for n in sizes if n & (n - 1) == 0 or n in (max_num_seqs, sizes[-1])]
