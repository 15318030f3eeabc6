"""Qwen2 and Qwen2.5, dense: biases on queries, keys and values, none elsewhere."""

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.frame import CausalLM, DecoderLayer


class Qwen2ForCausalLM(CausalLM):
    def make_layer(self, config: ModelConfig, i: int) -> DecoderLayer:
        return DecoderLayer(config, Attention(config, self.rope, qkv_bias=True), GatedMLP(config))
