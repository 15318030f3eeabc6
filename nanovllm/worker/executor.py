"""Runs steps for the engine behind step.py's protocol. For now there is one way: in this
process."""

import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from itertools import cycle
from typing import Any

import torch

from nanovllm.config import EngineConfig
from nanovllm.core.model_config import ModelConfig
from nanovllm.core.step import StepInput, StepOutput
from nanovllm.ops import platform
from nanovllm.worker.runner import ModelRunner, Sampled
from nanovllm.worker.worker import Worker

STEPS_IN_FLIGHT = 4  # more than any engine has


class InProcessExecutor:
    """One Worker in the caller's process; arguments are the worker's.

    Attributes:
        plan: how large the cache is.
        device, dtype: where and in what the model computes.
        description: of all that was chosen, for the log.
        mixed_tokens, mixed_keys: as the engine's.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        device: torch.device,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ):
        self.device = device
        try:
            with platform.use(device):
                self.worker = Worker(
                    config, model_config, device, max_num_seqs, max_num_batched_tokens
                )
        except BaseException as error:
            # Its frames hold weights for as long as somebody holds the exception.
            traceback.clear_frames(error.__traceback__)
            platform.release_memory(device)
            raise
        self.events = None
        if device.type == "cuda":
            self.events = cycle([torch.cuda.Event() for _ in range(STEPS_IN_FLIGHT)])
        self.plan, self.dtype = self.worker.plan, self.worker.dtype
        self.description = self.worker.description
        self.mixed_tokens = self.worker.mixed_tokens
        self.mixed_keys = self.worker.attention.mixed_keys

    @property
    def runner(self) -> ModelRunner:
        """What runs the steps; not while the worker sleeps."""
        assert self.worker.runner is not None
        return self.worker.runner

    def submit(self, step: StepInput) -> "SampledTokens":
        with platform.use(self.device):
            sampled = self.runner.run(step)
            written = next(self.events) if self.events else None
            if written is not None:
                written.record()
        return SampledTokens(sampled, written)

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Raises RuntimeError while the weights sleep."""
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
        # A step in flight writes into page-locked memory, also when nobody wants its tokens.
        with suppress(RuntimeError):  # a device that failed has nothing in flight
            self._wait()
        del self.worker
        with suppress(RuntimeError):  # nor anything to give back
            platform.release_memory(self.device)

    def _wait(self) -> None:
        """For the steps in flight."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class SampledTokens:
    """Tokens on their way from the device.

    Args:
        sampled: what the device writes to.
        written: recorded behind that; None: it is there.
    """

    def __init__(self, sampled: Sampled, written: torch.cuda.Event | None):
        self.sampled, self.written = sampled, written

    def result(self) -> StepOutput:
        if self.written is not None:
            self.written.synchronize()
        token_ids, places, logprobs, scores, errors = self.sampled
        return StepOutput(token_ids[places].tolist(), logprobs, scores, errors)
