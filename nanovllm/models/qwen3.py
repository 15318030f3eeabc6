"""Qwen3, dense: RMSNorm on every query and key head before RoPE; biases only if config.json sets
attention_bias."""

from typing import Any

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.frame import CausalLM, DecoderLayer


class Qwen3ForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, hf: dict[str, Any]) -> ModelConfig:
        if hf.get("head_dim") is None:  # not hidden_size / heads, as elsewhere
            hf = {**hf, "head_dim": 128}
        return super().read_config(hf)

    def make_layer(self, config: ModelConfig, i: int) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, self.rope, qkv_bias=bias, o_bias=bias, qk_norm=True)
        return DecoderLayer(config, attention, GatedMLP(config))
