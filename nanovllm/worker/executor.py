"""Runs steps for the engine behind step.py's protocol. For now there is one way: in this
process."""

import torch

from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.step import StepInput, StepOutput
from nanovllm.worker.model_runner import ModelRunner


class InProcessExecutor:
    """One ModelRunner in the caller's process; arguments are the runner's.

    Attributes:
        plan: how large the cache is.
        device, dtype: where and in what the model computes.
        description: of all that was chosen, for the log.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_num_seqs: int):
        self.runner = ModelRunner(config, model_config, max_num_seqs)
        self.plan = self.runner.plan
        self.device, self.dtype = self.runner.device, self.runner.dtype
        self.description = self.runner.description

    def submit(self, step: StepInput) -> "SampledTokens":
        return SampledTokens(self.runner.run(step))


class SampledTokens:
    """Tokens on the device until they are asked for."""

    def __init__(self, token_ids: torch.Tensor):
        self.token_ids = token_ids

    def result(self) -> StepOutput:
        return StepOutput(self.token_ids.tolist())
