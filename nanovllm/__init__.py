"""nanovllm: offline LLM inference. The public names are imported when first used, so that importing
a part of the engine doesn't import torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.async_llm import AsyncLLM
    from nanovllm.core.metrics import Counter, Gauge, Histogram, Metric
    from nanovllm.frontend.beam_search import BeamSearchOutput, BeamSearchSequence
    from nanovllm.frontend.prompts import TextPrompt, TokensPrompt
    from nanovllm.llm import LLM
    from nanovllm.outputs import CompletionOutput, Loglikelihood, Logprob, RequestOutput
    from nanovllm.sampling_params import (
        BeamSearchParams,
        RequestOutputKind,
        SamplingParams,
        StructuredOutputsParams,
    )

_MODULES = {
    "LLM": "nanovllm.llm",
    "AsyncLLM": "nanovllm.async_llm",
    "BeamSearchOutput": "nanovllm.frontend.beam_search",
    "BeamSearchParams": "nanovllm.sampling_params",
    "BeamSearchSequence": "nanovllm.frontend.beam_search",
    "CompletionOutput": "nanovllm.outputs",
    "Counter": "nanovllm.core.metrics",
    "Gauge": "nanovllm.core.metrics",
    "Histogram": "nanovllm.core.metrics",
    "Loglikelihood": "nanovllm.outputs",
    "Metric": "nanovllm.core.metrics",
    "Logprob": "nanovllm.outputs",
    "RequestOutput": "nanovllm.outputs",
    "RequestOutputKind": "nanovllm.sampling_params",
    "SamplingParams": "nanovllm.sampling_params",
    "StructuredOutputsParams": "nanovllm.sampling_params",
    "TextPrompt": "nanovllm.frontend.prompts",
    "TokensPrompt": "nanovllm.frontend.prompts",
}
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Counter",
    "Gauge",
    "Histogram",
    "Loglikelihood",
    "Logprob",
    "Metric",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
