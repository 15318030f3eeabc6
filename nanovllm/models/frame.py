"""The frame that all dense decoder-only families share; a family's file says what its layers are
made of.

Module names are Hugging Face's, so that a parameter's name is its name in the checkpoint.
"""

from typing import ClassVar

import torch
from torch import nn

from nanovllm import ops
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import Embedding, Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.ops.batch import ForwardBatch, KVCache, KVLayer, Residual


class DecoderLayer(nn.Module):
    """A pre-norm layer: x += attention(norm(x)), then x += MLP(norm(x)). Both get their norm, to
    fuse it with their first product.
    """

    def __init__(self, config: ModelConfig, self_attn: Attention, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Residual, batch: ForwardBatch, kv: KVLayer) -> None:
        self.self_attn(x, self.input_layernorm, batch, kv)
        self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embedding and layers; the final norm comes with the LM head, for the tokens that need it."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer]):
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        x = Residual(self.embed_tokens(batch.token_ids))  # [T, hidden], new memory
        for layer, pages in zip(self.layers, kv.layers, strict=False):
            layer(x, batch, pages)
        return ops.summed(x)


class CausalLM(nn.Module):
    """A language model: `hidden = model(batch, kv)`, then `model.logits` of the tokens that need
    them.

    Args:
        config: the checkpoint's architecture.
        max_positions: positions that may occur, for the RoPE table.
    """

    # Which tensors of a checkpoint are rows of one parameter here, in their order.
    packed: ClassVar[dict[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    # Endings of tensors that some checkpoints hold and no model needs.
    ignored: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)

    def __init__(self, config: ModelConfig, max_positions: int):
        super().__init__()
        rope = Rope(config.rope, config.head_dim, max_positions)
        layers = [self.make_layer(config, rope) for _ in range(config.num_layers)]
        self.model = Decoder(config, layers)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.is_tied = config.tie_word_embeddings
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def make_layer(self, config: ModelConfig, rope: Rope) -> DecoderLayer:
        """A layer of this family."""
        raise NotImplementedError

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """[T, hidden] of the batch's tokens, before the final norm; their keys and values go to the
        cache."""
        return self.model(batch, kv)

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[n, vocab] from [n, hidden]; in `out` if it is there."""
        return self.lm_head(hidden, self.model.norm, out=out)
