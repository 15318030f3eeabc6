"""The model families, by the name that a config.json gives in `architectures`. A family's file is
imported when a checkpoint needs it."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanovllm.models.frame import CausalLM

REGISTRY: "dict[str, str | type[CausalLM]]" = {
    "LlamaForCausalLM": "nanovllm.models.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": "nanovllm.models.qwen2:Qwen2ForCausalLM",
    "Qwen3ForCausalLM": "nanovllm.models.qwen3:Qwen3ForCausalLM",
}
NO_MODEL = "a model is a subclass of nanovllm.models.frame.CausalLM or 'module:Class'"


def register(architecture: str, model: "str | type[CausalLM]") -> None:
    """Make a family of your own known, or replace one, before `LLM(...)` loads a checkpoint of it.

    Args:
        architecture: the name in config.json's `architectures`.
        model: a subclass of models/frame.py's CausalLM, or "package.module:Class", which is
            imported when a checkpoint needs it.

    Raises:
        ValueError: `model` is neither a class nor such a path. What is behind them is checked when
            a checkpoint is loaded.
    """
    is_path = isinstance(model, str) and all(model.partition(":"))
    if not is_path and not isinstance(model, type):
        raise ValueError(f"{architecture!r}: {NO_MODEL}, not {model!r}")
    REGISTRY[architecture] = model


def model_class(architecture: str) -> "type[CausalLM]":
    """The class of an architecture. Raises ValueError for one that is not supported."""
    model = REGISTRY.get(architecture)
    if model is None:
        raise ValueError(
            f"architecture {architecture!r:.80} is not supported; supported: {', '.join(REGISTRY)} "
            f"(nanovllm.models.register adds others)"
        )
    if isinstance(model, str):
        module, _, name = model.partition(":")
        try:
            model = getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"architecture {architecture!r} is registered as {model!r}: {error}"
            ) from error
    from nanovllm.models.frame import CausalLM

    if not (isinstance(model, type) and issubclass(model, CausalLM)):
        raise ValueError(f"{architecture!r}: {NO_MODEL}, not {model!r}")
    return model
