"""nanovllm: offline LLM inference. The public names are imported when first used, so that importing
a part of the engine doesn't import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.arguments import FlexibleArgumentParser
    from nanovllm.async_llm import AsyncLLM, AsyncLLMEngine
    from nanovllm.config import ProfilerConfig
    from nanovllm.core.metrics import Counter, Gauge, Histogram, Metric, Vector
    from nanovllm.engine_args import AsyncEngineArgs, EngineArgs
    from nanovllm.frontend.beam_search import BeamSearchOutput, BeamSearchSequence
    from nanovllm.frontend.prompts import TextPrompt, TokensPrompt
    from nanovllm.llm import LLM, PromptType
    from nanovllm.llm_engine import LLMEngine, cleanup_dist_env_and_memory, init_logger
    from nanovllm.outputs import (
        CompletionOutput,
        FlatLogprobs,
        Loglikelihood,
        Logprob,
        RequestOutput,
    )
    from nanovllm.sampling_params import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

_MODULES = {
    "AsyncEngineArgs": "nanovllm.engine_args",
    "AsyncLLM": "nanovllm.async_llm",
    "AsyncLLMEngine": "nanovllm.async_llm",
    "BeamSearchOutput": "nanovllm.frontend.beam_search",
    "BeamSearchParams": "nanovllm.sampling_params",
    "BeamSearchSequence": "nanovllm.frontend.beam_search",
    "CompletionOutput": "nanovllm.outputs",
    "Counter": "nanovllm.core.metrics",
    "EngineArgs": "nanovllm.engine_args",
    "FlatLogprobs": "nanovllm.outputs",
    "FlexibleArgumentParser": "nanovllm.arguments",
    "Gauge": "nanovllm.core.metrics",
    "Histogram": "nanovllm.core.metrics",
    "LLM": "nanovllm.llm",
    "LLMEngine": "nanovllm.llm_engine",
    "Loglikelihood": "nanovllm.outputs",
    "Logprob": "nanovllm.outputs",
    "Metric": "nanovllm.core.metrics",
    "ProfilerConfig": "nanovllm.config",
    "PromptType": "nanovllm.llm",
    "RequestOutput": "nanovllm.outputs",
    "RequestOutputKind": "nanovllm.sampling_params",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
    "TextPrompt": "nanovllm.frontend.prompts",
    "TokensPrompt": "nanovllm.frontend.prompts",
    "Vector": "nanovllm.core.metrics",
    "cleanup_dist_env_and_memory": "nanovllm.llm_engine",
    "init_logger": "nanovllm.llm_engine",
}
__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Counter",
    "EngineArgs",
    "FlatLogprobs",
    "FlexibleArgumentParser",
    "Gauge",
    "Histogram",
    "LLMEngine",
    "Loglikelihood",
    "Logprob",
    "Metric",
    "ProfilerConfig",
    "PromptType",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "Vector",
    "cleanup_dist_env_and_memory",
    "init_logger",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
