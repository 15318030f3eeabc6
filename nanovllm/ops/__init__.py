"""The operations between the matrix products, by device. Layers and the worker call these names;
each has its textbook in reference.py, reference_sampling.py or torch, and its kernel for GPUs in a
module of Triton's.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from nanovllm.ops import reference, reference_sampling
from nanovllm.ops.cpu import pack_weight, packs_weights

if TYPE_CHECKING:
    from nanovllm.core.model_config import ModelConfig
    from nanovllm.ops.batch import Attention, ForwardBatch, KVLayer, Residual, Rotary

__all__ = [
    "add_linear",
    "attention",
    "begin_step",
    "copy_pinned",
    "default_block_size",
    "keep_sampled",
    "linear",
    "make_attention",
    "pack_weight",
    "packs_weights",
    "qk_norm_rope_store",
    "rms_norm",
    "sample",
    "summed",
    "top_logprobs",
]

Op = TypeVar("Op", bound=Callable[..., Any])


def _by_device(op: Op, kernels: str = "layers") -> Op:
    """The textbook's operation, or for tensors on a GPU that of the same name in the module with
    the kernels, which is not imported before."""

    @functools.wraps(op)
    def call(x: "torch.Tensor | Residual", *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda:
            return op(x, *args, **kwargs)
        module = import_module(f"nanovllm.ops.triton.{kernels}")
        return getattr(module, op.__name__)(x, *args, **kwargs)

    return call  # type: ignore[return-value]


rms_norm = _by_device(reference.rms_norm)
linear = _by_device(reference.linear, "linear")
add_linear = _by_device(reference.add_linear, "linear")
summed = _by_device(reference.summed)
qk_norm_rope_store = _by_device(reference.qk_norm_rope_store)
sample = _by_device(reference_sampling.sample, "sampling")
top_logprobs = _by_device(reference_sampling.top_logprobs, "limits")
keep_sampled = _by_device(reference.keep_sampled, "rows")


def attention(
    qkv: torch.Tensor, rotary: "Rotary", kv: "KVLayer", batch: "ForwardBatch", scale: float
) -> torch.Tensor:
    """From the QKV projection to the heads' outputs: norms, RoPE, keys and values into their pages,
    attention.

    Args:
        qkv: [T, (H + 2K) * D].

    Returns: [T, H, D].
    """
    fused = batch.attention.attend_projected
    if fused is not None and batch.is_decode:
        return fused(qkv, rotary, kv, batch, scale)
    q = qk_norm_rope_store(qkv, rotary, batch, kv)
    return batch.attention.attend(q, kv, batch, scale)


def begin_step(*args: Any) -> None:
    """As triton/rows.py's begin_step, on a GPU alone."""
    from nanovllm.ops.triton import rows as triton_rows

    triton_rows.begin_step(*args)


def copy_pinned(out: torch.Tensor, source: torch.Tensor) -> None:
    """Copy between a GPU and page-locked memory, without waiting; a multiple of four bytes."""
    from nanovllm.ops.triton import layers as triton_ops

    triton_ops.copy(out, source)


def default_block_size(attention_backend: str | None) -> int:
    """Tokens a page, where the user does not say."""
    return 256 if attention_backend == "FLASH_ATTN" else 16


def make_attention(
    name: str | None,
    config: "ModelConfig",
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_decodes: int,
) -> "Attention":
    """The attention backend of a model on a device.

    Args:
        name: "TORCH_SDPA", "TRITON_ATTN" or "FLASH_ATTN"; "auto" or None: the fastest there is for
            any page size.
        config: the model's sizes.
        block_size: tokens a page.
        dtype: of queries and cache.
        max_decodes: of a step.

    Raises:
        ValueError: it does not run there; says what does.
    """
    available = ("TORCH_SDPA",) if device.type == "cpu" else ("TRITON_ATTN", "FLASH_ATTN")
    name = available[0] if name in (None, "auto") else name
    if name not in available:
        raise ValueError(
            f"attention_backend {name!r} does not run on {device}; there is "
            f"{' and '.join(map(repr, available))} (or 'auto')"
        )
    if name == "FLASH_ATTN":
        from nanovllm.ops.flash_attention import FlashAttention

        return FlashAttention(config.head_dim, dtype, block_size)
    if name == "TRITON_ATTN":
        from nanovllm.ops.triton.attention import TritonAttention

        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        sizes = (config.num_heads, config.num_kv_heads, config.head_dim, block_size)
        return TritonAttention(*sizes, dtype, device, num_sms, max_decodes)
    return reference.TorchAttention()
