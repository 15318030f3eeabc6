"""The gated feed-forward layer of Llama-like models (SwiGLU, Shazeer 2020)."""

from torch import nn

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.ops.batch import Residual


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Args:
        config: sizes.
        bias: whether the projections have biases.
    """

    def __init__(self, config: ModelConfig, *, bias: bool = False):
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, size, size, bias=bias)
        self.down_proj = Linear(size, config.hidden_size, bias=bias)

    def forward(self, x: Residual, norm: RMSNorm) -> None:
        """x += MLP(norm(x))."""
        self.down_proj.add_to(x, self.gate_up_proj(x, norm, gated=True))
