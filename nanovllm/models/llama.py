"""Llama 2 and 3.x: no norms on heads; biases only if config.json sets them."""

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.models.frame import CausalLM, DecoderLayer


class LlamaForCausalLM(CausalLM):
    def make_layer(self, config: ModelConfig, i: int) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, self.rope, qkv_bias=bias, o_bias=bias)
        return DecoderLayer(config, attention, GatedMLP(config, bias=config.mlp_bias))
