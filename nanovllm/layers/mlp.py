"""Feed-forward layers: gated (SwiGLU, Shazeer 2020, and its like) and plain."""

import torch
from torch import nn

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.activation import ACTIVATIONS
from nanovllm.layers.linear import Linear, Product
from nanovllm.layers.stream import Normed


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Args:
        config: sizes.
        bias: whether the projections have biases.
        activation: a name of ACTIVATIONS.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = False, activation: str = "silu"):
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: torch.Tensor | Normed) -> Product:
        return self.down_proj(self.gate_up_proj(x).tensor(gate=self.activation))


class MLP(nn.Module):
    """down(activation(up(x))); arguments as GatedMLP's."""

    def __init__(self, config: ModelConfig, *, bias: bool = False, activation: str = "gelu"):
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor | Normed) -> Product:
        return self.down_proj(self.activation(self.up_proj(x).tensor()))
