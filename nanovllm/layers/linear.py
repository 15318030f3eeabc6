"""Matrix products with weights. A Linear returns a Product, which is multiplied where it is used.

Models call it; the multiplication is the weight format's (quantization/).
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanovllm import ops
from nanovllm.layers.activation import ACTIVATIONS
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.stream import Normed
from nanovllm.quantization.weight_format import Plain, WeightFormat


class Linear(nn.Module):
    """x @ weight.T + bias. Several projections of the same input may be packed in one weight, row
    after row; models/loader.py fills each from its own tensor of the checkpoint.

    Args:
        in_features: size of the input.
        sizes: outputs of each projection.
        bias: whether the projections have biases.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, in_features: int, *sizes: int, bias: bool = False):
        super().__init__()
        self.in_features, self.sizes = in_features, sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sizes))) if bias else None
        self.format: WeightFormat = Plain()

    def use(self, format: WeightFormat) -> None:
        """Hold the weight in another format from now on: its tensors take the place of `weight`."""
        del self.weight
        for name, tensor in format.tensors(self.in_features, self.sizes).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.format = format

    def forward(self, x: "torch.Tensor | Normed") -> "Product":
        """The product with x, [T, in]."""
        return Product(self, x)


@dataclass(slots=True)
class Product:
    """A product that is not multiplied yet: what takes it decides how. `stream.add` adds it to the
    stream, `tensor` gives it as a tensor."""

    linear: Linear
    x: torch.Tensor | Normed

    def tensor(self, gate: str | None = None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The result.

        Args:
            gate: the name of an activation: the Linear's outputs are gate, then up, and the result
                is activation(gate) * up.
            out: [T, out], where the result goes.

        Returns: [T, out]; [T, out / 2] with `gate`; `out` if it is given.
        """
        linear, x, norm = self.linear, self.x, None
        num_rows = (x if isinstance(x, torch.Tensor) else x.stream.total).shape[0]
        fuses = linear.format.fuses(linear, num_rows)
        if isinstance(x, Normed):
            rms = x.norm  # a subclass may compute something else
            if fuses and type(rms) is RMSNorm and x.value is None:
                x.check()
                x, norm = x.stream.total, (rms.weight, rms.eps)
            else:
                x = x.tensor()
        gates = fuses and gate == "silu"
        y = linear.format.multiply(linear, x, norm, gates, out)
        if gate == "silu" and not gates:
            y = ops.silu_and_mul(y)
        elif gate is not None and not gates:
            gate_half, up = y.chunk(2, dim=-1)
            y = ACTIVATIONS[gate](gate_half) * up
        return y if out is None or y is out else out.copy_(y)
