"""Microseconds of CPU time for a step of plain decodes, without a model and without a GPU.

python tools/bench_host.py [SEQUENCES ...]

"engine" is Engine.step over an executor that does nothing: scheduling, blocks, stop checks.
"worker" is ModelRunner's work on the host for a step that a CUDA graph replays, without the
launches: columns into pinned memory and, every 64 steps, the attention's work list, packed for the
upload. Contexts have 100 to 500 tokens, sampled with temperature, two steps in flight. Each number
is the mean over 64 steps (so one work list serves them, and each sequence opens four blocks), the
fastest of several; "with ends" is the worker with a work list for each step, as when a sequence
ends in every step.
"""

import sys
import time
from array import array
from collections.abc import Iterable

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import CacheGroup, StepInput, StepOutput
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.ops.triton.attention import TritonAttention
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.record import StepRecord, layout, make_records, pack
from nanovllm.worker.rows import Rows

BLOCK_SIZE = 16
NUM_STEPS = 320


class Done:
    def __init__(self, step: StepInput):
        self.output = StepOutput([7] * int(step.samples.sum()))

    def result(self) -> StepOutput:
        return self.output


class NullExecutor:
    def __init__(self, num_seqs: int = 1024):
        self.groups = (CacheGroup(num_seqs * 40, BLOCK_SIZE),)

    def prompt_budget(self, num_decodes: int, waiting: Iterable[tuple[int, int]]) -> int:
        return 16384 - num_decodes

    def submit(self, step: StepInput) -> Done:
        return Done(step)

    def close(self) -> None:
        pass


class HostExecutor(NullExecutor):
    """The host's part of ModelRunner's steps of decodes, timed."""

    def __init__(self, max_num_seqs: int, steps_per_list: int | None = None):
        super().__init__(max_num_seqs)
        device = torch.device("cpu")
        attention = TritonAttention(
            16, 8, 128, BLOCK_SIZE, torch.bfloat16, device, num_sms=132, max_decodes=max_num_seqs
        )
        if steps_per_list is not None:
            attention.steps_per_list = steps_per_list
        self.size = max_num_seqs
        max_tokens = max(16384, max_num_seqs)
        self.rows = Rows(max_num_seqs, 1, 256, 151936, device)
        self.inputs = InputBuilder(self.rows, (attention,), BLOCK_SIZE, max_tokens)
        self.records, _ = make_records(max_num_seqs, 1, max_tokens, device)
        self.num_steps = 0
        self.arrays: dict[str, np.ndarray] = {}
        self.offsets: dict[tuple[str, ...], dict[str, int]] = {}
        self.buffer = np.empty(1 << 22, np.uint8)
        self.seconds: list[float] = []

    def submit(self, step: StepInput) -> Done:
        start_time = time.perf_counter()
        record = self.records[self.num_steps % len(self.records)]
        self.num_steps += 1
        record.begin()
        self.rows.start(step.starts, record)
        if step.chunks:
            self.inputs.begin(step, record)
        else:
            self._run_decodes(step, record)
            self.seconds.append(time.perf_counter() - start_time)
        return super().submit(step)

    def _run_decodes(self, step: StepInput, record: StepRecord) -> None:
        arrays = self.inputs.begin(step, record, self.size)
        if arrays is not self.arrays:
            names = tuple(arrays)
            if names not in self.offsets:
                self.offsets[names], _ = layout(arrays)
            pack(arrays, self.offsets[names], self.buffer)
            self.arrays = arrays


def make_engine(executor: NullExecutor, num_seqs: int) -> Engine:
    """An engine with `num_seqs` sequences in the middle of their decodes."""
    engine = Engine(
        executor,
        max_num_seqs=num_seqs,
        max_num_batched_tokens=max(16384, num_seqs),
        depth=2,
    )
    params = SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=NUM_STEPS + 64)
    for i in range(num_seqs):
        prompt = array("I", [(i * 7919 + j) % 1000 for j in range(100 + i % BLOCK_SIZE)])
        engine.add(Sequence(str(i), prompt, params, seed=i, max_model_len=4096))
    for _ in range(20):
        engine.step()
    return engine


def run(engine: Engine) -> list[float]:
    seconds = []
    for _ in range(NUM_STEPS):
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    return seconds


def best_microseconds(seconds: list[float]) -> float:
    block = TritonAttention.steps_per_list
    blocks = np.array(seconds[: len(seconds) // block * block]).reshape(-1, block)
    return float(blocks.mean(axis=1).min() * 1e6)


def main() -> None:
    ops.begin_step = lambda *_: None  # type: ignore[assignment]  # a kernel
    for num_seqs in map(int, sys.argv[1:] or ["1", "16", "256", "1024"]):
        engine = min(best_microseconds(run(make_engine(NullExecutor(), num_seqs))) for _ in "ab")
        workers = []
        for steps_per_list in (None, 1):
            host = HostExecutor(num_seqs, steps_per_list)
            run(make_engine(host, num_seqs))
            workers.append(best_microseconds(host.seconds))
        print(
            f"{num_seqs:5} sequences: engine {engine:5.0f} us, worker {workers[0]:5.0f} us, "
            f"with ends {workers[1]:5.0f} us"
        )


if __name__ == "__main__":
    main()
