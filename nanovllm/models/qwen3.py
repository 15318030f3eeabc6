"""Qwen3, dense: RMSNorm on every query and key head before RoPE; biases only if config.json asks
for them."""

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.rope import Rope
from nanovllm.models.frame import CausalLM, DecoderLayer


class Qwen3ForCausalLM(CausalLM):
    def make_layer(self, config: ModelConfig, rope: Rope) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, rope, qkv_bias=bias, o_bias=bias, qk_norm=True)
        return DecoderLayer(config, attention, GatedMLP(config))
