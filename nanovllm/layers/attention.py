"""Grouped-query self-attention over the paged KV cache."""

from torch import nn

from nanovllm import ops
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.ops.batch import ForwardBatch, KVLayer, Residual, Rotary


class Attention(nn.Module):
    """Project, rotate and store, attend, project.

    Args:
        config: sizes.
        rope: shared by all layers.
        qkv_bias, o_bias: whether the projections have biases.
        qk_norm: whether each query and key head is normalised before RoPE.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
    ):
        super().__init__()
        q_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, q_size, kv_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=o_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None
        self.rope = rope
        self.eps = config.rms_norm_eps
        self.scale = config.head_dim**-0.5

    def forward(self, x: Residual, norm: RMSNorm, batch: ForwardBatch, kv: KVLayer) -> None:
        """x += attention(norm(x))."""
        qkv = self.qkv_proj(x, norm)  # [T, (H + 2K) * D]
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        rotary = Rotary(norms, self.eps, self.rope.table)
        out = ops.attention(qkv, rotary, kv, batch, self.scale)  # [T, H, D]
        self.o_proj.add_to(x, out.flatten(1))
