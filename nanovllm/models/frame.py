"""The frame that decoder-only families share; a family's file says what its layers are made of.

The worker builds a model (loader.py) and calls it; layers/ has the parts. Module names are Hugging
Face's, so that a parameter's name is its name in the checkpoint.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import Linear
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.layers.stream import Stream
from nanovllm.ops.batch import AttentionSpec, ForwardBatch, KVCache, KVLayer
from nanovllm.quantization.weight_format import WeightFormat


class DecoderLayer(nn.Module):
    """A pre-norm layer, Llama's. A family with other layers overrides `forward`, and may add
    modules.

    Args:
        config: sizes.
        self_attn, mlp: take a normed input; what they return is added to the stream.
    """

    def __init__(self, config: ModelConfig, self_attn: Attention, mlp: nn.Module):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = self_attn
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, x: Stream, batch: ForwardBatch, kv: KVLayer) -> None:
        x.add(self.self_attn(x.normed(self.input_layernorm), batch, kv))
        x.add(self.mlp(x.normed(self.post_attention_layernorm)))


class Decoder(nn.Module):
    """What checkpoints call `model`: all parameters but the LM head's."""

    def __init__(self, config: ModelConfig, layers: list[nn.Module]):
        super().__init__()
        # Not drawn: a random draw without memory has torch import its compiler, for seconds.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(weight)
        self.layers = nn.ModuleList(layers)
        self.norm: nn.Module = RMSNorm(config.hidden_size, config.rms_norm_eps)


class CausalLM(nn.Module):
    """A language model: `hidden = model(batch, kv)`, then `model.logits` of the tokens that need
    them.

    Args:
        config: the checkpoint's architecture.
        max_positions: positions that may occur, for RoPE's tables.

    Attributes:
        rope: RoPE as config.json has it, for all layers that use it.
        attention_specs: of each layer; the worker sizes the KV cache by them.
        formats: by a Linear's name, the format of its weight in the checkpoint; not named: plain.
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
        self.config, self.max_positions = config, max_positions
        self.rope = Rope(config.rope, config.head_dim, max_positions)
        layers: list[Any] = [self.make_layer(config, i) for i in range(config.num_layers)]
        self.model = Decoder(config, layers)
        self.attention_specs: list[AttentionSpec] = [layer.self_attn.spec for layer in layers]
        self.formats: dict[str, WeightFormat] = {}
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.is_tied = config.tie_word_embeddings
        if self.is_tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    # What a family says

    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        """Read a config.json. Raises ValueError for what the family does not support."""
        return ModelConfig.from_hf(hf)

    def make_layer(self, config: ModelConfig, i: int) -> nn.Module:
        """Layer i: called as layer(stream, batch, kv); its `self_attn.spec` says what it caches."""
        raise NotImplementedError

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[T, hidden], in new memory: the residual stream begins with it."""
        return self.model.embed_tokens(token_ids)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> torch.Tensor:
        """[T, hidden] of the batch's tokens, before the final norm; their keys and values go to the
        cache. A cache of fewer layers runs the first ones."""
        x = Stream(self.embed(batch.token_ids))
        for layer, layer_kv in zip(self.model.layers, kv.layers, strict=False):
            layer(x, batch, layer_kv)
        return x.total

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[n, vocab] from [n, hidden]; in `out` if it is given."""
        return self.lm_head(Stream(hidden).normed(self.model.norm)).tensor(out=out)

    # Loading

    def sources(self) -> dict[str, torch.Tensor]:
        """Where each tensor of a checkpoint goes, by its name there: a parameter, or a view of the
        part of one that it fills. A family overrides it for other names and layouts (a view may be
        transposed, a slice, one expert of many)."""
        targets: dict[str, torch.Tensor] = {}
        for name, param in self.named_parameters():
            path, _, kind = name.rpartition(".")
            module, leaf = self.get_submodule(path), path.rpartition(".")[2]
            if not isinstance(module, Linear):
                targets[name] = param
                continue
            parts, sizes = self.packed.get(leaf), module.sizes
            if parts is None:
                parts, sizes = (leaf,), (sum(sizes),)
            dim, per_element = module.format.outputs.get(kind, (0, 1))
            lengths = [-(-size // per_element) if per_element else 1 for size in sizes]
            for part, view in zip(parts, param.split(lengths, dim), strict=True):
                view = view if per_element else view.squeeze(dim)
                targets[f"{path.removesuffix(leaf)}{part}.{kind}"] = view
        return targets
