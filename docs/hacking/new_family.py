"""A model family: attention and MLP in parallel, LayerNorm, scaled logits (as in Cohere's models).

python docs/hacking/new_family.py        # on a made-up checkpoint
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanovllm import LLM, SamplingParams, models
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.norm import LayerNorm
from nanovllm.models.frame import CausalLM, DecoderLayer
from nanovllm.models.loader import build_model


class ParallelLayer(DecoderLayer):
    def __init__(self, config, *parts):
        super().__init__(config, *parts)
        self.input_layernorm = LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)
        del self.post_attention_layernorm

    def forward(self, x, batch, kv):
        normed = x.normed(self.input_layernorm)
        for product in (self.self_attn(normed, batch, kv), self.mlp(normed)):
            x.add(product)


class ParallelForCausalLM(CausalLM):
    def make_layer(self, config, i):
        return ParallelLayer(config, Attention(config, self.rope), GatedMLP(config))

    def make_norm(self, config):
        return LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)

    def logits(self, hidden, out=None):
        return super().logits(hidden, out).mul_(self.config.hf["logit_scale"])


def main() -> list[int]:
    models.register("ParallelForCausalLM", ParallelForCausalLM)
    hf = json.loads(Path("assets/tiny-qwen3/config.json").read_text())
    hf |= {"architectures": ["ParallelForCausalLM"], "logit_scale": 0.25}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(hf))
        model = build_model(ParallelForCausalLM.read_config(hf), 1, torch.float32)
        tensors = {name: torch.randn(t.shape) * 0.05 for name, t in model.sources().items()}
        save_file(tensors, Path(folder, "model.safetensors"))
        with LLM(folder, tokenizer="assets/tiny-qwen3", max_model_len=256) as llm:
            [output] = llm.generate("In the beginning", SamplingParams(seed=0))
    print("weights at random, so words at random:", output["text"])
    return output["token_ids"]


if __name__ == "__main__":
    main()
