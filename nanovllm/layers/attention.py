"""Grouped-query self-attention over the paged KV cache."""

import torch
from torch import nn

from nanovllm import ops
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear, Product
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.layers.stream import Normed
from nanovllm.ops.batch import AttentionSpec, ForwardBatch, KVLayer, Rotary


class Attention(nn.Module):
    """Project, rotate and store, attend, project.

    Args:
        config: sizes.
        rope: of queries and keys, shared by layers; None: they are not rotated.
        qkv_bias, o_bias: whether the projections have biases.
        qk_norm: whether each query and key head is normalised before RoPE.
        scale: of the products of queries and keys; None: head_dim ** -0.5.
        window: tokens that a query sees, itself included; None: all before it.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope | None,
        *,
        qkv_bias: bool = False,
        o_bias: bool = False,
        qk_norm: bool = False,
        scale: float | None = None,
        window: int | None = None,
    ):
        super().__init__()
        num_heads, num_kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.spec = AttentionSpec(
            num_heads, num_kv_heads, head_dim, scale or head_dim**-0.5, window
        )
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv_proj = Linear(config.hidden_size, q_size, kv_size, kv_size, bias=qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=o_bias)
        self.q_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None
        self.rope = rope

    def forward(self, x: torch.Tensor | Normed, batch: ForwardBatch, kv: KVLayer) -> Product:
        """The attention of x, [T, hidden], which is normed already."""
        spec, qkv = self.spec, self.qkv_proj(x).tensor()  # [T, (H + 2K) * D]
        norms = (self.q_norm.weight, self.k_norm.weight) if self.q_norm and self.k_norm else None
        if self.rope is not None:  # in one kernel
            rotary = Rotary(norms, self.q_norm.eps if self.q_norm else 0.0, self.rope.table)
            out = ops.attention(qkv, rotary, kv, batch, spec.scale)  # [T, H, D]
        else:
            sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
            q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split(sizes, dim=1)
            if self.q_norm and self.k_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            ops.store(k, v, kv, batch)
            out = ops.attend(q, kv, batch, spec.scale)
        return self.o_proj(out.flatten(1))
