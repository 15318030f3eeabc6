"""Steps that nobody asked for. A GPU tries them at its start: to have kernels compiled, and to see
what memory a step and its graphs take.

worker.py calls it with a ModelRunner on a cache of one page, of which nothing is kept.
"""

from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.sampling_params import MAX_LOGPROBS, SamplingParams
from nanovllm.worker.cache_plan import GPUMemory
from nanovllm.worker.graphs import graph_sizes
from nanovllm.worker.runner import ModelRunner

if TYPE_CHECKING:
    from nanovllm.ops.triton.compile_ahead import KernelCompiler


def largest_step(max_num_seqs: int, num_tokens: int, max_model_len: int) -> StepInput:
    """As many tokens as a step may have, and as many rows of logits. What else may be asked of a
    row takes less memory than its layers did."""
    num_seqs = min(max_num_seqs, num_tokens)
    query_lens = [min(max_model_len, num_tokens // num_seqs)] * num_seqs
    query_lens[0] = min(max_model_len, num_tokens - sum(query_lens[1:]))
    params = SamplingParams(temperature=1.0)
    step = StepInput()
    for row, query_len in enumerate(query_lens):
        # Cached to the end: the one page there is is read, and nothing is stored.
        step.starts.append(RowStart(row, max_model_len, params, 0, (), 0))
        step.chunks.append(Chunk(row, 0, [0] * query_len, samples=True))
    return step


def _mixed_step(num_decodes: int) -> StepInput:
    """Decodes beside a chunk: they run other kernels than decodes alone."""
    rows = np.arange(num_decodes)
    zeros = np.zeros_like(rows)
    step = StepInput(decode_rows=rows, decode_positions=zeros, decode_blocks=zeros[None] - 1)
    params = SamplingParams(temperature=0.0)
    step.starts.append(RowStart(num_decodes, 1, params, 0, (), 0))
    step.chunks.append(Chunk(num_decodes, 0, [0], samples=True))
    return step


def _doubling(max_num_seqs: int, sizes: list[int]) -> list[int]:
    """Sizes that between them launch what all graphs do: a size that begins with other kernels
    (kernel_configs.py) is more than twice the one before. Python, which noting launches and
    compiling compete for, is what a start waits for."""
    sizes = sizes or graph_sizes(max_num_seqs)  # without graphs: of decodes
    return [n for n in sizes if n & (n - 1) == 0 or n in (max_num_seqs, sizes[-1])]


@torch.inference_mode()
def compile_kernels(
    compiler: "KernelCompiler",
    runner: ModelRunner,
    num_tokens: int,
    max_model_len: int,
    sizes: list[int],
) -> list[Future[None]]:
    """Have threads compile the kernels of all steps but odd ones. Which? Those that the largest
    step launches, of num_tokens, steps of some graphs' sizes, and so many decodes beside a chunk;
    on weights that are anything yet. Those of odd batches follow, when the engine may be running
    already.

    Returns: what to wait for before the first step.
    """
    from nanovllm.ops.triton.kernel_configs import MAX_GEMV_ROWS

    def decode(num_decodes: int, size: int, position: int = 0) -> None:
        arrays = runner.begin_decodes(num_decodes, size, position)
        runner.forward(size, runner.uploader.upload(arrays))

    max_num_seqs = runner.max_num_seqs
    # Copies run in the trial too: torch's own operations read the inputs.
    runner.uploader.upload({"compiled": np.zeros(1, np.int64)})
    with compiler.instead_of_launches() as compiling:
        runner.run(largest_step(1, num_tokens, max_model_len))  # long chunks take longest
        runner.run(largest_step(max_num_seqs, num_tokens, max_model_len))
        for size in _doubling(max_num_seqs, sizes):
            decode(1, size)
            if size < max_num_seqs:
                runner.inputs.last_tokens.zero_()  # nobody has drawn any
                runner.run(_mixed_step(size))
    with compiler.instead_of_launches():  # nobody waits for these
        # All rows' tables are zeros: a prefix that they share, if it is long enough.
        decode(max_num_seqs, max_num_seqs, max_model_len - 1)
        for size in range(1, min(MAX_GEMV_ROWS, max_num_seqs) + 1):
            decode(1, size)
        # Other layouts of attention, where no larger batch had them compiled.
        decode(1, 1, max_model_len - 1)
        runner.run(largest_step(1, 1, max_model_len))
        logits = runner.step_logits[:1]
        one = torch.ones(1, device=logits.device)
        keys = one.new_zeros((1, 2), dtype=torch.int64)
        ops.sample(logits, one, keys, top_p=one)
        ops.top_logprobs(logits, keys[:, 0], MAX_LOGPROBS)
    return compiling


@torch.inference_mode()
def measured_bytes(
    runner: ModelRunner, memory: GPUMemory, num_tokens: int, max_model_len: int, sizes: list[int]
) -> tuple[int, int, int]:
    """What this engine takes beside the cache, in bytes: what lasts, what the largest step takes
    beside that, and what CUDA graphs of such sizes do."""
    step = largest_step(runner.max_num_seqs, num_tokens, max_model_len)
    runner.run(step)  # loads kernels and libraries, which stay
    lasting = memory.used()
    torch.cuda.reset_peak_memory_stats(memory.device)
    before = torch.cuda.memory_reserved(memory.device)
    runner.run(step)
    # Reserved, not allocated: with the gaps that the step's tensors leave between them.
    step_bytes = torch.cuda.max_memory_reserved(memory.device) - before
    return lasting, step_bytes, _graph_bytes(runner, memory, lasting, sizes) if sizes else 0


def _graph_bytes(runner: ModelRunner, memory: GPUMemory, lasting: int, sizes: list[int]) -> int:
    """Graphs share their memory, so the largest costs most, and each of the others about what the
    second costs; and those for other layouts of attention (shared prefixes, long contexts), which
    come later, as much again: most sizes meet one of them at most."""
    *others, largest = sizes
    graphs = runner.capture([largest])
    first = memory.used() - lasting
    del graphs
    if not others:
        return first
    graphs = runner.capture([others[-1], largest])
    second = max(0, memory.used() - lasting - first)
    del graphs
    return first + (2 * len(others) + 1) * second
