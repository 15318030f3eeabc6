"""The operations of a step, by device. Layers and the worker call these names; each has its
textbook in a module reference*.py, and its kernel for GPUs in triton/.
"""

import functools
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F

from nanovllm.ops import reference, reference_rows, reference_sampling

if TYPE_CHECKING:
    from nanovllm.ops.batch import (
        Attention,
        AttentionSpec,
        ForwardBatch,
        KVLayer,
        Rotary,
        RowState,
        StepColumns,
    )

__all__ = [
    "attend",
    "attention",
    "begin_step",
    "default_block_size",
    "keep_sampled",
    "make_attention",
    "rms_norm",
    "sample",
    "silu_and_mul",
    "store",
    "top_logprobs",
]

Op = TypeVar("Op", bound=Callable[..., Any])


def _by_device(op: Op, kernels: str) -> Op:
    """The textbook's operation; or, for tensors on a GPU, the one of the same name in this module
    of triton/, which is imported when it is first called."""

    @functools.wraps(op)
    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not x.is_cuda:
            return op(x, *args, **kwargs)
        module = import_module(f"nanovllm.ops.triton.{kernels}")
        return getattr(module, op.__name__)(x, *args, **kwargs)

    return call  # type: ignore[return-value]


sample = _by_device(reference_sampling.sample, "sampling")
top_logprobs = _by_device(reference_sampling.top_logprobs, "limits")
keep_sampled = _by_device(reference_rows.keep_sampled, "rows")


def begin_step(columns: "StepColumns", state: "RowState", *args: Any) -> None:
    """As reference_rows.begin_step."""
    if not state.last_tokens.is_cuda:
        return reference_rows.begin_step(columns, state, *args)
    from nanovllm.ops.triton import rows as triton_rows

    return triton_rows.begin_step(columns, state, *args)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension of x, in new memory."""
    if not x.is_cuda:
        return reference.rms_norm(x, weight, eps)
    from nanovllm.ops.triton import layers

    return layers.rms_norm(x, weight, eps)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for [..., gate | up]."""
    if not gate_up.is_cuda:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    from nanovllm.ops.triton import layers

    return layers.silu_and_mul(gate_up)


def store(k: torch.Tensor, v: torch.Tensor, kv: "KVLayer", batch: "ForwardBatch") -> None:
    """Put keys and values, [T, K, D] each, into the batch's slots of the cache, before `attend`."""
    slots = batch.groups[kv.group].slot_mapping
    if not k.is_cuda:
        reference.store(k, v, kv, slots)
        return
    from nanovllm.ops.triton import layers

    layers.store(k, v, kv, slots)


def attend(q: torch.Tensor, kv: "KVLayer", batch: "ForwardBatch", scale: float) -> torch.Tensor:
    """Causal attention of queries [T, H, D] over their sequences' blocks; returns [T, H, D]."""
    return batch.groups[kv.group].attention.attend(q.contiguous(), kv, batch, scale)


def attention(
    qkv: torch.Tensor, rotary: "Rotary", kv: "KVLayer", batch: "ForwardBatch", scale: float
) -> torch.Tensor:
    """From the QKV projection to the heads' outputs: norms, RoPE, keys and values into the cache,
    attention.

    Args:
        qkv: [T, (H + 2K) * D].

    Returns: [T, H, D].
    """
    backend = batch.groups[kv.group].attention
    if batch.is_decode and backend.attend_projected is not None:
        return backend.attend_projected(qkv, rotary, kv, batch, scale)
    if qkv.is_cuda:
        from nanovllm.ops.triton import layers

        q = layers.qk_norm_rope_store(qkv, rotary, batch, kv)
    else:
        q = reference.qk_norm_rope_store(qkv, rotary, batch, kv)
    return backend.attend(q, kv, batch, scale)


def default_block_size(attention_backend: str | None) -> int:
    """Tokens per block, where the user does not say."""
    return 256 if attention_backend == "FLASH_ATTN" else 16


def make_attention(
    name: str | None,
    spec: "AttentionSpec",
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_decodes: int,
) -> "Attention":
    """The attention backend of a group of layers.

    Args:
        name: "TORCH_SDPA", "TRITON_ATTN" or "FLASH_ATTN"; "auto" or None: the fastest one that
            takes any block size.
        spec: what the group's layers have in common.
        block_size: tokens per block.
        dtype: of queries and cache.
        max_decodes: of a step.

    Raises:
        ValueError: the backend does not run there, or not such layers; says what does.
    """
    available = ("TORCH_SDPA",) if device.type == "cpu" else ("TRITON_ATTN", "FLASH_ATTN")
    name = available[0] if name in (None, "auto") else name
    if name not in available:
        raise ValueError(
            f"attention_backend {name!r} does not run on {device}; there is "
            f"{' and '.join(map(repr, available))} (or 'auto')"
        )
    if name == "TORCH_SDPA":
        from nanovllm.ops.reference_attention import TorchAttention

        return TorchAttention(spec.window)
    if spec.window is not None:
        raise ValueError(
            f"attention_backend {name!r} attends to all tokens, and this model has layers with a "
            f"window of {spec.window}; device='cpu' runs it"
        )
    if name == "FLASH_ATTN":
        from nanovllm.ops.flash_attention import FlashAttention

        return FlashAttention(spec.head_dim, dtype, block_size)
    from nanovllm.ops.triton.attention import TritonAttention

    num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = (spec.num_heads, spec.num_kv_heads, spec.head_dim, block_size)
    return TritonAttention(*sizes, dtype, device, num_sms, max_decodes)
