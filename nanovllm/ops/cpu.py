"""Matrix products on a CPU. On x86 oneDNN reads a weight fastest in an order of its own.

reference.linear calls matmul; models/weights.py packs what is loaded.
"""

import torch
import torch.nn.functional as F

# The batch that the order is chosen for; others use it too. Small ones, decodes, gain most.
PACKED_FOR = 32


def packs_weights(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether weights have an order of their own on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False  # nobody has measured it there
    return {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }.get(dtype, False)


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of [out, in] in the device's order, which only matmul reads; the weight itself where
    there is none."""
    if not packs_weights(weight.device, weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x @ weight.T + bias.

    Args:
        x: [T, in].
        weight: [out, in], plain or packed.
        bias: [out] or None.

    Returns: [T, out].
    """
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
