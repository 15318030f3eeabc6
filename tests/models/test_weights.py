"""Weight formats and loading from anything that yields names and tensors."""

from typing import ClassVar

import pytest
import torch
from conftest import TINY
from safetensors.torch import load_file, save_file

from nanovllm import LLM, SamplingParams
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.models import REGISTRY, register
from nanovllm.models.checkpoint import read_json
from nanovllm.models.loader import (
    WeightError,
    allocate,
    build_model,
    load_weights,
    prepare_weights,
)
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.quantization.weight_format import WeightFormat

pytestmark = pytest.mark.usefixtures("one_thread")


class Int8(WeightFormat):
    """Made up: [in, out] with a scale for each output, in the checkpoint; [out, in] in memory."""

    outputs: ClassVar = {"qweight": (1, 1)}

    def tensors(self, in_features, sizes):
        return {
            "qweight": torch.empty(in_features, sum(sizes), dtype=torch.int8),
            "scales": torch.empty(sum(sizes)),
        }

    def prepare(self, linear):
        linear.qweight.data = linear.qweight.T.contiguous()
        return self

    def multiply(self, linear, x, norm=None, gated=False, out=None):
        y = x @ linear.qweight.T.to(x.dtype) * linear.scales
        return y if linear.bias is None else y + linear.bias


class Int8Qwen3(Qwen3ForCausalLM):
    def __init__(self, config, max_positions):
        super().__init__(config, max_positions)
        for name, module in self.model.named_modules(prefix="model"):
            if isinstance(module, Linear):
                self.formats[name] = Int8()


def tokens(folder):
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    options = dict(dtype="float32", skip_tokenizer_init=True, kv_cache_memory_bytes=4 << 20)
    with LLM(str(folder), **options) as llm:
        outputs = llm.generate([[5, 6, 7], [9] * 40], params, use_tqdm=False)
    return [output["token_ids"] for output in outputs]


def test_a_weight_format(copy_tiny, monkeypatch):
    monkeypatch.setattr("nanovllm.models.REGISTRY", dict(REGISTRY))
    register("Int8Qwen3ForCausalLM", Int8Qwen3)
    folder = copy_tiny(config={"architectures": ["Int8Qwen3ForCausalLM"]})
    file = folder / "model.safetensors"
    plain, quantized = {}, {}
    for name, weight in load_file(file).items():
        plain[name] = quantized[name] = weight.float()
        if name.endswith("_proj.weight"):
            scales = plain[name].abs().amax(1) / 127
            q = (plain[name] / scales[:, None]).round().to(torch.int8)
            plain[name] = q * scales[:, None]
            stem = name.removesuffix("weight")
            del quantized[name]
            quantized |= {f"{stem}qweight": q.T.contiguous(), f"{stem}scales": scales}
    save_file(quantized, file)
    actual = tokens(folder)
    save_file(plain, file)
    with pytest.raises(ValueError, match=r"model.safetensors: .*_proj.weight has no place in Int8"):
        tokens(folder)
    register("Int8Qwen3ForCausalLM", Qwen3ForCausalLM)
    assert actual == tokens(folder)


class Blocks(WeightFormat):
    """Scales for blocks of 48 outputs, a scale for each projection, 4 bits packed along outputs."""

    outputs: ClassVar = {"scale_inv": (0, 48), "input_scale": (0, 0), "qzeros": (1, 8)}

    def tensors(self, in_features, sizes):
        return {
            "weight": torch.empty(sum(sizes), in_features, dtype=torch.float8_e4m3fn),
            "scale_inv": torch.empty(sum(-(-size // 48) for size in sizes), 3),
            "input_scale": torch.empty(len(sizes)),
            "qzeros": torch.empty(5, sum(sizes) // 8, dtype=torch.int32),
        }


def test_where_the_tensors_of_a_format_go(model):
    for layer in model.model.layers:
        layer.self_attn.qkv_proj.use(Blocks())
        layer.self_attn.o_proj.use(Blocks())
    sources = model.sources()
    for name, out in (("q", 256), ("k", 128), ("v", 128), ("o", 256)):
        path = f"model.layers.1.self_attn.{name}_proj"
        shapes = {
            kind.removeprefix(f"{path}."): list(view.shape)
            for kind, view in sources.items()
            if kind.startswith(path)
        }
        assert shapes == {
            "weight": [out, 256],
            "scale_inv": [-(-out // 48), 3],
            "input_scale": [],
            "qzeros": [5, out // 8],
        }
    sources["model.layers.1.self_attn.v_proj.scale_inv"].fill_(7.0)
    sources["model.layers.1.self_attn.k_proj.input_scale"].fill_(7.0)
    linear = model.model.layers[1].self_attn.qkv_proj
    assert (linear.scale_inv[9:] == 7.0).all() and linear.scale_inv.shape == (12, 3)
    assert linear.input_scale[1] == 7.0


@pytest.fixture
def model():
    config = ModelConfig.from_hf(read_json(TINY, "config.json", required=True))
    model = build_model(config, 8, torch.float32)
    allocate(model, torch.device("cpu"))
    return model


def test_weights_from_an_iterator(model):
    weights = load_file(TINY / "model.safetensors")
    assert set(model.sources()) == set(weights)
    for factor in (1, 2):  # once more, in place
        before = {name: target.data_ptr() for name, target in model.sources().items()}
        load_weights(model, ((name, weight * factor) for name, weight in weights.items()))
        for name, target in model.sources().items():
            assert torch.equal(target, weights[name].float() * factor)
            assert target.data_ptr() == before[name]
    q, k, v = (weights[f"model.layers.1.self_attn.{n}_proj.weight"].float() * 2 for n in "qkv")
    assert torch.equal(model.model.layers[1].self_attn.qkv_proj.weight, torch.cat((q, k, v)))
    prepare_weights(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.popitem(), "the checkpoint lacks 1 weights that config.json asks for: model."),
        (lambda w: w.update(x=torch.zeros(1)), "x has no place in Qwen3ForCausalLM"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(3)}),
            r"model.norm.weight has shape \[3\], config.json says \[256\]",
        ),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(256).to(torch.float8_e4m3fn)}),
            "model.norm.weight is in torch.float8_e4m3fn: quantized weights",
        ),
        (
            lambda w: w.update({"lm_head.weight": torch.zeros(2560, 256)}),
            "lm_head.weight differs from the embedding",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(model, change, message):
    weights = load_file(TINY / "model.safetensors")
    change(weights)
    with pytest.raises(WeightError, match=message):
        load_weights(model, weights.items())


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_embedding_may_lie_under_the_heads_name(model):
    weights = load_file(TINY / "model.safetensors")
    weights[HEAD] = weights.pop(EMBEDDING)
    load_weights(model, weights.items())
    assert torch.equal(model.model.embed_tokens.weight, weights[HEAD].float())
    with pytest.raises(WeightError, match=r"lm_head.weight has shape \[9, 256\], config.json says"):
        load_weights(model, (weights | {HEAD: weights[HEAD][:9]}).items())
    del weights[HEAD]
    with pytest.raises(WeightError, match=f"lacks 1 weights .* asks for: {EMBEDDING}"):
        load_weights(model, weights.items())


def test_a_head_that_is_not_tied_must_be_there():
    hf = read_json(TINY, "config.json", required=True) | {"tie_word_embeddings": False}
    model = build_model(ModelConfig.from_hf(hf), 8, torch.float32)
    allocate(model, torch.device("cpu"))
    with pytest.raises(WeightError, match=f"lacks 1 weights that config.json asks for: {HEAD}"):
        load_weights(model, load_file(TINY / "model.safetensors").items())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_broken_weights_are_a_warning(model, value, caplog):
    weights = load_file(TINY / "model.safetensors")
    load_weights(model, weights.items())
    assert not caplog.records
    for name in ("model.norm.weight", "model.layers.1.self_attn.k_proj.weight"):
        weights[name].view(-1)[-1] = value
    load_weights(model, weights.items())
    [record] = caplog.records
    assert "2 weights have NaN or infinite values" in record.getMessage()
    assert "k_proj" in record.getMessage() and "model.norm.weight" in record.getMessage()
    weights[EMBEDDING].view(-1)[0] = value
    load_weights(model, (weights | {HEAD: weights[EMBEDDING]}).items())  # it differs from no NaN
    assert "3 weights have NaN" in caplog.messages[-1]
