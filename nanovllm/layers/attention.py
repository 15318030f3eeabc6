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
    """Project, rotate and store, attend, project. A family may replace the norms of heads and RoPE
    by modules of its own.

    Args:
        config: sizes.
        rope: a Rope, shared by layers; None: queries and keys are not rotated.
        qkv_bias, o_bias: whether the projections have biases.
        qk_norm: whether each query and key head is normalised before RoPE.
        scale: of the products of queries and keys; None: head_dim ** -0.5.
        window: tokens that a query sees, itself included; None: all before it.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: nn.Module | None,
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
        norms = [RMSNorm(head_dim, config.rms_norm_eps) if qk_norm else None for _ in range(2)]
        self.q_norm: nn.Module | None = norms[0]
        self.k_norm: nn.Module | None = norms[1]
        self.rope = rope

    def forward(self, x: torch.Tensor | Normed, batch: ForwardBatch, kv: KVLayer) -> Product:
        """The attention of x, [T, hidden], which is normed already."""
        spec, qkv = self.spec, self.qkv_proj(x).tensor()  # [T, (H + 2K) * D]
        rotary = self._rotary()
        if rotary is not None:
            out = ops.attention(qkv, rotary, kv, batch, spec.scale)  # [T, H, D]
        else:
            rope, q_norm, k_norm = self.rope, self.q_norm, self.k_norm
            sizes = [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads]
            q, k, v = qkv.unflatten(1, (-1, spec.head_dim)).split(sizes, dim=1)
            q = q if q_norm is None else q_norm(q)
            k = k if k_norm is None else k_norm(k)
            if rope is not None:
                q, k = rope(q, batch.positions), rope(k, batch.positions)
            ops.store(k, v, kv, batch)
            out = ops.attend(q, kv, batch, spec.scale)
        return self.o_proj(out.flatten(1))

    def _rotary(self) -> Rotary | None:
        """What a kernel does with heads before attention; None: a family has put modules here that
        no kernel knows."""
        rope, norms = self.rope, (self.q_norm, self.k_norm)
        if type(rope) is not Rope or rope.table.shape[1] != self.spec.head_dim:
            return None
        if norms == (None, None):
            return Rotary(None, 0.0, rope.table)
        q_norm, k_norm = norms
        if type(q_norm) is not RMSNorm or type(k_norm) is not RMSNorm or q_norm.eps != k_norm.eps:
            return None
        if not q_norm.weight.shape == k_norm.weight.shape == (self.spec.head_dim,):
            return None
        return Rotary((q_norm.weight, k_norm.weight), q_norm.eps, rope.table)
