"""Runs steps for the engine behind step.py's protocol. For now there is one way: in this
process."""

import ctypes
import traceback
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.core.model_config import ModelConfig
from nanovllm.core.step import MIXED_STEPS, StepInput
from nanovllm.ops import platform
from nanovllm.ops.batch import Attention
from nanovllm.worker.record import StepRecord
from nanovllm.worker.runner import ModelRunner
from nanovllm.worker.worker import Worker


class InProcessExecutor:
    """One Worker in the caller's process; arguments are the worker's.

    Attributes:
        groups: the KV cache, group by group.
        max_model_len: tokens of the longest sequence.
        device, dtype: where and in what the model computes.
        description: of all that was chosen, for the log.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        device: torch.device,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        limited: bool = False,
    ):
        self.device = device
        sizes = max_num_seqs, max_num_batched_tokens
        try:
            with platform.use(device):
                self.worker = Worker(config, model_config, device, *sizes, limited)
        except BaseException as error:
            # Its frames hold weights for as long as the exception lives.
            traceback.clear_frames(error.__traceback__)
            platform.release_memory(device)
            raise
        self.groups, self.dtype = self.worker.plan.groups, self.worker.dtype
        self.max_model_len = self.worker.plan.max_model_len
        self.description = self.worker.description

    @property
    def runner(self) -> ModelRunner:
        """What runs the steps; not while the worker sleeps."""
        assert self.worker.runner is not None
        return self.worker.runner

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attention backend of each group of layers, for tools that watch it."""
        return self.worker.attentions

    def submit(self, step: StepInput) -> StepRecord:
        with platform.use(self.device):
            return self.runner.run(step)

    def prompt_budget(self, num_decodes: int, waiting: Iterable[tuple[int, int]]) -> int:
        """As in the protocol. Prompts fill the largest CUDA graph beside the decodes, as far as its
        attention may read their keys; if that would take more than MIXED_STEPS steps, one step that
        is launched kernel by kernel takes all."""
        worker = self.worker
        full = worker.max_num_batched_tokens - num_decodes
        if not num_decodes or not worker.graph_sizes:
            return full
        num_tokens = budget = 0
        room, keys = worker.mixed_tokens - num_decodes, worker.mixed_keys
        for new_tokens, seq_tokens in waiting:
            num_tokens += new_tokens
            if room > 0:
                joining = min(new_tokens, room, keys // seq_tokens)
                room = room - joining if joining == new_tokens else 0
                budget, keys = budget + joining, keys - joining * seq_tokens
            if num_tokens > MIXED_STEPS * budget:
                return full
        return budget

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        if self.worker.model is None:
            raise RuntimeError("the weights sleep: call wake_up() first")
        return [func(self.worker.model)]

    @property
    def sleeping(self) -> Collection[str]:
        return self.worker.sleeping

    def sleep(self, level: int) -> None:
        self._wait()
        with platform.use(self.device):
            self.worker.sleep(level)

    def wake_up(self, tags: Collection[str]) -> None:
        try:
            with platform.use(self.device):
                self.worker.wake_up(tags)
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"GPU memory is too small to wake up: {error}. All sleeps on; free some memory and "
                f"call wake_up once more"
            ) from None

    def is_usable(self) -> bool:
        """After some errors of a kernel every call to CUDA fails."""
        try:
            self._wait()
        except RuntimeError:
            return False
        return True

    def close(self) -> None:
        """Give the memory back; no step may follow."""
        # A step in flight writes into pinned memory, also when its tokens are never read.
        if not self.is_usable():
            # On a GPU that failed the destructors of pinned memory and CUDA graphs raise, which
            # ends the process: the worker stays until the process itself ends.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.worker))
            del self.worker
            return
        del self.worker
        platform.release_memory(self.device)

    def _wait(self) -> None:
        """For the steps in flight."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
