"""Steps without requests: a GPU tries them at its start, to see what memory a step and its graphs
take.

worker.py and compile_ahead.py call it with a ModelRunner on a cache of one block, of which nothing
is kept.
"""

import numpy as np
import torch

from nanovllm.core.step import Chunk, RowStart, StepInput
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.cache_plan import GPUMemory
from nanovllm.worker.runner import ModelRunner


def largest_step(
    max_num_seqs: int, num_tokens: int, max_model_len: int, num_groups: int = 1
) -> StepInput:
    """A step of num_tokens tokens and the largest number of sampled ones. All that requests may
    want beside takes less memory than the layers did."""
    num_seqs = min(max_num_seqs, num_tokens)
    query_lens = [min(max_model_len, num_tokens // num_seqs)] * num_seqs
    query_lens[0] = min(max_model_len, num_tokens - sum(query_lens[1:]))
    params = SamplingParams(temperature=1.0)
    step = StepInput(decode_blocks=np.empty((num_groups, 0), np.int32))
    tables = (np.empty(0, np.int32),) * num_groups
    for row, query_len in enumerate(query_lens):
        # Cached to the end: the only block is read, and nothing is stored.
        step.starts.append(RowStart(row, max_model_len, params, 0, (), 0, tables))
        step.chunks.append(Chunk(row, 0, [0] * query_len, samples=True))
    return step


def measured_bytes(
    runner: ModelRunner,
    memory: GPUMemory,
    num_tokens: int,
    max_model_len: int,
    sizes: list[int],
    limited: bool,
) -> tuple[int, int, int]:
    """What this engine takes beside the cache, in bytes: what lasts, what the largest step takes
    beside that, and what CUDA graphs of these sizes do.

    Args:
        limited: whether graphs with limits are captured too.
    """
    num_groups = len(runner.inputs.attentions)
    step = largest_step(runner.max_num_seqs, num_tokens, max_model_len, num_groups)
    runner.run(step)  # loads kernels and libraries, which stay
    lasting = memory.used()
    torch.cuda.reset_peak_memory_stats(memory.device)
    before = torch.cuda.memory_reserved(memory.device)
    runner.run(step)
    # Reserved, not allocated: with the gaps that the step's tensors leave between them.
    step_bytes = torch.cuda.max_memory_reserved(memory.device) - before
    if not sizes:
        return lasting, step_bytes, 0
    return lasting, step_bytes, _graph_bytes(runner, memory, lasting, sizes, limited)


def _graph_bytes(
    runner: ModelRunner, memory: GPUMemory, lasting: int, sizes: list[int], limited: bool
) -> int:
    """Graphs share their memory, so the largest costs most, and each of the others about what the
    second costs. Others for the same sizes come later (shared prefixes, long contexts, limits):
    room for one more each, and for those with limits, if they are captured at the start."""
    *others, largest = sizes
    graphs = runner.capture([largest], limited=False)
    first = memory.used() - lasting
    del graphs
    if not others:
        return first
    graphs = runner.capture([others[-1], largest], limited=False)
    second = max(0, memory.used() - lasting - first)
    del graphs
    return first + ((3 if limited else 2) * len(others) + 1 + limited) * second
