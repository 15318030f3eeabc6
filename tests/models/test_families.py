"""Families that are defined here, outside the package: what is a line each in a family's file
equals a plain implementation in float32."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny_models import engine_logits

from nanovllm import LLM, SamplingParams, ops
from nanovllm.core.model_config import ModelConfig, RopeConfig
from nanovllm.layers.activation import ACTIVATIONS
from nanovllm.layers.attention import Attention
from nanovllm.layers.mlp import MLP, GatedMLP
from nanovllm.layers.norm import LayerNorm, RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.models import REGISTRY, model_class, register
from nanovllm.models.frame import CausalLM, DecoderLayer
from nanovllm.models.loader import build_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, head_dim=16, max_position_embeddings=256,
    rms_norm_eps=1e-5, tie_word_embeddings=False,
)  # fmt: skip


# Norms after attention and MLP as well, with weights around 0, an embedding multiplier, RoPE that
# differs by layer, logits with a soft cap: as in Gemma 3.


class AroundZero(RMSNorm):
    def forward(self, x):
        x = x if isinstance(x, torch.Tensor) else x.tensor()
        return ops.rms_norm(x, 1 + self.weight, self.eps)


class SandwichLayer(DecoderLayer):
    def __init__(self, config, *parts):
        super().__init__(config, *parts)
        self.post_mlp_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.pre_mlp_layernorm = AroundZero(config.hidden_size, config.rms_norm_eps)
        self.self_attn.k_norm = AroundZero(config.head_dim, config.rms_norm_eps)

    def forward(self, x, batch, kv):
        attention = self.self_attn(x.normed(self.input_layernorm), batch, kv)
        x.add(self.post_attention_layernorm(attention))
        x.add(self.post_mlp_layernorm(self.mlp(x.normed(self.pre_mlp_layernorm))))


class SandwichForCausalLM(CausalLM):
    def make_layer(self, config, i):
        local = i % 2 == 0
        rope = Rope(RopeConfig(100.0), config.head_dim, self.max_positions) if local else self.rope
        mlp = GatedMLP(config, activation="gelu_pytorch_tanh")
        return SandwichLayer(config, Attention(config, rope, qk_norm=True, scale=0.2), mlp)

    def embed(self, token_ids):
        return super().embed(token_ids) * self.config.hidden_size**0.5

    def logits(self, hidden, out=None):
        return super().logits(hidden, out).div_(5.0).tanh_().mul_(5.0)


# Attention and MLP beside each other, LayerNorm, a plain MLP, some layers without RoPE.


class ParallelLayer(DecoderLayer):
    def __init__(self, config, *parts):
        super().__init__(config, *parts)
        self.input_layernorm = LayerNorm(config.hidden_size, config.rms_norm_eps)
        del self.post_attention_layernorm

    def forward(self, x, batch, kv):
        normed = x.normed(self.input_layernorm)
        attention, mlp = self.self_attn(normed, batch, kv), self.mlp(normed)
        x.add(attention)
        x.add(mlp)


class ParallelForCausalLM(CausalLM):
    @classmethod
    def read_config(cls, hf):
        return ModelConfig.from_hf(hf, activations=ACTIVATIONS)

    def __init__(self, config, max_positions):
        super().__init__(config, max_positions)
        self.model.norm = LayerNorm(config.hidden_size, config.rms_norm_eps, bias=False)

    def make_layer(self, config, i):
        attention = Attention(config, None if i == 1 else self.rope, qkv_bias=True, qk_norm=True)
        return ParallelLayer(
            config, attention, MLP(config, bias=True, activation=config.hidden_act)
        )


# RMSNorm beside each other, which a GPU fuses with both products; multipliers, as in Granite;
# attention with norms of all heads at once, as in OLMo 2.


class WideNormAttention(Attention):
    def __init__(self, config, rope, **options):
        super().__init__(config, rope, **options)
        self.q_norm, self.k_norm, _ = (RMSNorm(n, 1e-5) for n in self.qkv_proj.sizes)

    def forward(self, x, batch, kv):
        q, k, v = self.qkv_proj(x).tensor().split(self.qkv_proj.sizes, dim=1)
        q, k, v = (y.unflatten(1, (-1, 16)) for y in (self.q_norm(q), self.k_norm(k), v))
        ops.store(self.rope(k, batch.positions), v, kv, batch)
        out = ops.attend(self.rope(q, batch.positions), kv, batch, self.spec.scale)
        return self.o_proj(out.flatten(1))


class MultipliedLayer(DecoderLayer):
    def forward(self, x, batch, kv):
        m = self.residual_multiplier
        x.add(self.self_attn(x.normed(self.input_layernorm), batch, kv).tensor() * m)
        normed = x.normed(self.post_attention_layernorm)
        products = [self.mlp(normed), self.other_mlp(normed)]
        for product in products:
            x.add(product.tensor() * m)


class MultipliedForCausalLM(CausalLM):
    def make_layer(self, config, i):
        attention = WideNormAttention(config, self.rope, o_bias=True, scale=config.hf["scale"])
        layer = MultipliedLayer(config, attention, GatedMLP(config, activation="relu"))
        layer.other_mlp = GatedMLP(config, bias=True)
        layer.residual_multiplier = config.hf["residual_multiplier"]
        return layer

    def embed(self, token_ids):
        return super().embed(token_ids) * 3.0

    def logits(self, hidden, out=None):
        return super().logits(hidden, out).div_(self.config.hf["logits_scaling"])


# The plain implementations


def rms(x, weight):
    return x * (x.square().mean(-1, keepdim=True) + SIZES["rms_norm_eps"]).rsqrt() * weight


def linear(x, w, name):
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def plain_attention(x, w, path, theta, scale=0.25):
    """theta: None: no RoPE."""
    q, k, v = (linear(x, w, f"{path}.{n}_proj") for n in "qkv")
    q_norm, k_norm = w[f"{path}.q_norm.weight"], w[f"{path}.k_norm.weight"]
    if len(q_norm) > 16:
        q, k = rms(q, q_norm), rms(k, k_norm)
    q, k, v = (y.view(len(x), -1, 16) for y in (q, k, v))
    if len(q_norm) == 16:
        q, k = rms(q, q_norm), rms(k, k_norm)
    if theta is not None:
        angle = torch.arange(len(x))[:, None, None] * theta ** (-torch.arange(8) / 8)
        q, k = (
            torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)
            for a, b in (q.chunk(2, -1), k.chunk(2, -1))
        )
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    scores = torch.einsum("thd,lhd->htl", q, k) * scale
    scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
    out = torch.einsum("htl,lhd->thd", scores.softmax(-1), v)
    return linear(out.flatten(1), w, f"{path}.o_proj")


def plain_gated(x, w, path, act):
    up = linear(x, w, f"{path}.up_proj")
    return linear(act(linear(x, w, f"{path}.gate_proj")) * up, w, f"{path}.down_proj")


def plain_sandwich(x, w, i):
    p = f"model.layers.{i}"
    y = rms(x, w[f"{p}.input_layernorm.weight"])
    k_norm = f"{p}.self_attn.k_norm.weight"
    w = w | {k_norm: 1 + w[k_norm]}
    y = plain_attention(y, w, f"{p}.self_attn", 100.0 if i % 2 == 0 else 10000.0, 0.2)
    x = x + rms(y, w[f"{p}.post_attention_layernorm.weight"])
    y = rms(x, 1 + w[f"{p}.pre_mlp_layernorm.weight"])
    y = plain_gated(y, w, f"{p}.mlp", lambda x: F.gelu(x, approximate="tanh"))
    return x + rms(y, w[f"{p}.post_mlp_layernorm.weight"])


def plain_parallel(x, w, i, act):
    p = f"model.layers.{i}"
    norm = (w[f"{p}.input_layernorm.{kind}"] for kind in ("weight", "bias"))
    y = F.layer_norm(x, (48,), *norm, 1e-5)
    attention = plain_attention(y, w, f"{p}.self_attn", None if i == 1 else 10000.0)
    return x + attention + linear(act(linear(y, w, f"{p}.mlp.up_proj")), w, f"{p}.mlp.down_proj")


def plain_multiplied(x, w, i):
    p = f"model.layers.{i}"
    y = rms(x, w[f"{p}.input_layernorm.weight"])
    x = x + 0.7 * plain_attention(y, w, f"{p}.self_attn", 10000.0, 0.3)
    y = rms(x, w[f"{p}.post_attention_layernorm.weight"])
    mlps = plain_gated(y, w, f"{p}.mlp", F.relu) + plain_gated(y, w, f"{p}.other_mlp", F.silu)
    return x + 0.7 * mlps


def plain_logits(family, act, w, token_ids):
    x = w["model.embed_tokens.weight"][torch.tensor(token_ids)]
    norm = w["model.norm.weight"]
    x = x * {"Sandwich": 48**0.5, "Parallel": 1.0, "Multiplied": 3.0}[family]
    for i in range(3):
        if family == "Sandwich":
            x = plain_sandwich(x, w, i)
        elif family == "Parallel":
            x = plain_parallel(x, w, i, act)
        else:
            x = plain_multiplied(x, w, i)
    x = F.layer_norm(x, (48,), norm, None, 1e-5) if family == "Parallel" else rms(x, norm)
    logits = x @ w["lm_head.weight"].T
    return {
        "Sandwich": 5 * (logits / 5).tanh(), "Parallel": logits, "Multiplied": logits / 4,
    }[family]  # fmt: skip


# The tests


def write_checkpoint(folder, architecture, **changes):
    """A made-up checkpoint: what `sources` names, filled at random."""
    hf = {"architectures": [architecture], **SIZES, **changes}
    (folder / "config.json").write_text(json.dumps(hf))
    config = model_class(architecture).read_config(hf)
    torch.manual_seed(0)
    weights = {}
    for name, target in build_model(config, 1, torch.float32).sources().items():
        weights[name] = torch.randn(target.shape) * 0.2 + ("norm" in name)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def families(monkeypatch):
    monkeypatch.setattr("nanovllm.models.REGISTRY", dict(REGISTRY))
    for name in ("Sandwich", "Parallel", "Multiplied"):
        register(f"{name}ForCausalLM", f"{__name__}:{name}ForCausalLM")


PARALLEL = [
    dict(hidden_act=name, act=act)
    for name, act in [
        ("gelu", F.gelu),
        ("gelu_new", lambda x: F.gelu(x, approximate="tanh")),
        ("relu", F.relu),
        ("relu2", lambda x: F.relu(x) ** 2),
    ]
]
MULTIPLIED = dict(residual_multiplier=0.7, logits_scaling=4.0, scale=0.3)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("Sandwich", {}), *(("Parallel", c) for c in PARALLEL), ("Multiplied", MULTIPLIED)],
    ids=lambda value: value if isinstance(value, str) else value.get("hidden_act", "-"),
)
def test_a_family_equals_its_plain_implementation(families, tmp_path, family, changes):
    changes = dict(changes)
    act = changes.pop("act", None)
    folder = write_checkpoint(tmp_path, f"{family}ForCausalLM", **changes)
    weights = load_file(folder / "model.safetensors")
    token_ids = torch.randint(96, (70,)).tolist()
    expected = plain_logits(family, act, weights, token_ids)
    assert expected.std() > 0.1
    options = dict(dtype="float32", skip_tokenizer_init=True, num_gpu_blocks_override=20)
    with LLM(str(folder), **options) as llm:
        for chunk in (70, 7, 1):
            logits = engine_logits(llm, token_ids, chunk).cpu()
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        prompts = [token_ids[:5], token_ids[10:40], token_ids[:1]]
        for prompt, output in zip(
            prompts, llm.generate(prompts, params, use_tqdm=False), strict=True
        ):
            tokens = list(prompt)
            for _ in range(8):
                tokens.append(int(plain_logits(family, act, weights, tokens)[-1].argmax()))
            assert output["token_ids"] == tokens[len(prompt) :]


def test_what_cannot_be_registered_is_named(monkeypatch):
    monkeypatch.setattr("nanovllm.models.REGISTRY", dict(REGISTRY))
    for model in ("a module", ":Class", "module:", 5):
        with pytest.raises(ValueError, match=r"'XForCausalLM': a model is a subclass of nanovllm"):
            register("XForCausalLM", model)
    register("XForCausalLM", "no_such_module:Class")
    with pytest.raises(ValueError, match=r"registered as 'no_such_module:Class': No module named"):
        model_class("XForCausalLM")
    register("XForCausalLM", "json:Class")
    with pytest.raises(ValueError, match=r"registered as 'json:Class': module 'json' has no"):
        model_class("XForCausalLM")
    for model in ("json:JSONDecoder", int):
        register("XForCausalLM", model)
        with pytest.raises(ValueError, match=r"a model is a subclass of .*not <class '"):
            model_class("XForCausalLM")
    with pytest.raises(ValueError, match=r"'YForCausalLM' is not supported; .*models.register"):
        model_class("YForCausalLM")
    register("XForCausalLM", SandwichForCausalLM)
    assert model_class("XForCausalLM") is SandwichForCausalLM
