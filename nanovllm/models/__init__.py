"""The model families, by the name that a config.json gives in `architectures`. A family's file is
imported when needed."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.models.frame import CausalLM

REGISTRY = {
    "LlamaForCausalLM": "nanovllm.models.llama",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3",
}


def model_class(architecture: str) -> "type[CausalLM]":
    """The class of an architecture. Raises ValueError for one that is not supported."""
    if architecture not in REGISTRY:
        raise ValueError(
            f"architecture {architecture!r} is not supported; supported: {', '.join(REGISTRY)}"
        )
    return getattr(import_module(REGISTRY[architecture]), architecture)
