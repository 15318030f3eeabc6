"""The weight format of a Linear: how its tensors look in a checkpoint and in memory, and how they
multiply. There is the plain one, and the one that it becomes on a CPU.

layers/linear.py multiplies through it, models/loader.py fills and prepares its tensors. A format
keeps no state: all tensors are the Linear's own.
"""

from collections.abc import Sequence
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import nn

Norm = tuple[torch.Tensor, float]  # weight and eps of an RMSNorm
# The number of rows that oneDNN's order of a weight is chosen for; it serves others too. Few rows,
# decodes, gain most.
PACKED_FOR = 32


class Weights(Protocol):
    """What a format sees of a Linear: its bias, and the tensors that the format itself named."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class WeightFormat:
    """The base: a new format says `tensors` and `multiply`, and may say the rest.

    Attributes:
        outputs: how the outputs lie in a tensor, by its name: the dimension that they run along,
            and outputs per element of it; 0: one element for all outputs of a projection. The
            loader finds there the part of each projection of several packed in a Linear. A tensor
            that is not named has one output a row, (0, 1).
    """

    outputs: ClassVar[dict[str, tuple[int, int]]] = {}

    def tensors(self, in_features: int, sizes: Sequence[int]) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint that replace `weight`, by the ends of their names: empty, in
        their shapes and dtypes. FP8 in blocks, for one, has `weight` [out, in] and
        `weight_scale_inv` [blocks of out, in / 128], of outputs (0, 128); AWQ has `qweight`
        [in, out / 8], of outputs (1, 8), and two more.

        Args:
            sizes: outputs of each projection, which come one after another.
        """
        raise NotImplementedError

    def prepare(self, linear: Weights) -> "WeightFormat":
        """Called once after the weights are loaded, on their device: may replace the tensors.
        Returns the format in memory, which multiplies from now on."""
        return self

    def fuses(self, linear: Weights, num_rows: int) -> bool:
        """Whether `multiply` takes a norm and a gate along, for inputs of num_rows rows."""
        return False

    def multiply(
        self,
        linear: Weights,
        x: torch.Tensor,
        norm: Norm | None = None,
        gated: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x @ weight.T + bias.

        Args:
            linear: holds the tensors.
            x: [T, in].
            norm: of the RMSNorm that x goes through first; only where `fuses` says so.
            gated: the outputs are gate, then up, and the result is silu(gate) * up; only where
                `fuses` says so.
            out: [T, out], memory that may be used for the result.

        Returns: [T, out], or [T, out / 2] if gated.
        """
        raise NotImplementedError

    def add(self, linear: Weights, x: torch.Tensor, total: torch.Tensor) -> None:
        """Add the product of x to `total`, [T, out], in place."""
        total.add_(self.multiply(linear, x))


class Plain(WeightFormat):
    """`weight`, [out, in], in the dtype that the model computes in."""

    def prepare(self, linear: Weights) -> WeightFormat:
        weight = linear.weight
        if not packs_weights(weight.device, weight.dtype):
            return self
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR)
        linear.weight = nn.Parameter(packed, requires_grad=False)
        return Packed()

    def fuses(self, linear: Weights, num_rows: int) -> bool:
        if not linear.weight.is_cuda:
            return False
        from nanovllm.ops.triton import linear as triton_linear

        return triton_linear.fuses(linear.weight, num_rows)

    def multiply(
        self,
        linear: Weights,
        x: torch.Tensor,
        norm: Norm | None = None,
        gated: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if not x.is_cuda:
            return F.linear(x, linear.weight, linear.bias)
        from nanovllm.ops.triton import linear as triton_linear

        return triton_linear.linear(x, linear.weight, linear.bias, norm, gated, out)

    def add(self, linear: Weights, x: torch.Tensor, total: torch.Tensor) -> None:
        if not x.is_cuda:
            super().add(linear, x, total)
            return
        from nanovllm.ops.triton import linear as triton_linear

        triton_linear.add_linear(total, x, linear.weight, linear.bias)


class Packed(WeightFormat):
    """`weight` on a CPU, in the order that oneDNN reads fastest: what Plain becomes there."""

    def multiply(
        self,
        linear: Weights,
        x: torch.Tensor,
        norm: Norm | None = None,
        gated: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        # As torch's own compiler calls it: takes any number of rows.
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "none", [], "")


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
