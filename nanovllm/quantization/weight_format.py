"""The weight format of a Linear: its protocol, and the plain one, which most checkpoints have.

layers/linear.py multiplies through it, models/loader.py fills and prepares what it holds. A format
keeps no state: all tensors are the Linear's own.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from nanovllm.quantization import packed

Norm = tuple[torch.Tensor, float]  # weight and eps of an RMSNorm


class Weights(Protocol):
    """What a format sees of a Linear: its bias, and the tensors that the format itself named."""

    weight: torch.Tensor
    bias: torch.Tensor | None


class WeightFormat:
    """The base: what a new format has to say (tensors, part, multiply), and what it may."""

    def tensors(self, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
        """The tensors of a checkpoint that replace `weight`, by the ends of their names: empty,
        in their shapes and dtypes. FP8 in blocks, for one, has `weight` [out, in] and
        `weight_scale_inv` [out / 128, in / 128]; AWQ has `qweight` [in, out / 8] and two more.
        """
        raise NotImplementedError

    def part(self, name: str, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The part of a tensor (or of the bias) that belongs to outputs first to last - 1: a view,
        into which the loader copies one of several projections packed in a Linear."""
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
            gated: the outputs are gate, then up: return silu(gate) * up; only where `fuses` says
                so.
            out: [T, out], memory that may be used for the result.

        Returns: [T, out], or [T, out / 2] if gated.
        """
        raise NotImplementedError

    def add(self, linear: Weights, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor | None:
        """Add the product of x to `total`, [T, out], in place.

        Returns: [n, T, out] float32, partial sums that the caller has to add; None: no such sums.
        """
        total.add_(self.multiply(linear, x))
        return None


class Plain(WeightFormat):
    """`weight`, [out, in], in the dtype that the model computes in."""

    def tensors(self, in_features: int, out_features: int) -> dict[str, torch.Tensor]:
        return {"weight": torch.empty(out_features, in_features)}

    def part(self, name: str, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        return tensor[first:last]

    def prepare(self, linear: Weights) -> WeightFormat:
        if not packed.packs_weights(linear.weight.device, linear.weight.dtype):
            return self
        linear.weight = torch.nn.Parameter(packed.pack(linear.weight), requires_grad=False)
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

    def add(self, linear: Weights, x: torch.Tensor, total: torch.Tensor) -> torch.Tensor | None:
        if not x.is_cuda:
            return super().add(linear, x, total)
        from nanovllm.ops.triton import linear as triton_linear

        return triton_linear.add_linear(total, x, linear.weight, linear.bias)


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
