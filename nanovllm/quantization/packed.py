"""Weights packed for a CPU. On x86 oneDNN reads a weight fastest in an order of its own.

weight_format.py packs what is loaded.
"""

import torch

# The number of rows that the order is chosen for; it serves others too. Few rows, decodes, gain
# most.
PACKED_FOR = 32


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights have an order of their own on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False  # not measured there
    return {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }.get(dtype, False)


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A copy of [out, in] in oneDNN's order, where packs_weights says so."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
