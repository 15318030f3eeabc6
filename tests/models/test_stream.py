"""The residual stream with a GPU's kernels (interpreted where there is no GPU) and without: which
of them are launched, and that the results equal float64."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from kernel_calls import relative_error, tolerance

from bench import SHAPES
from nanovllm import ops
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers import linear as linear_module
from nanovllm.layers import norm as norm_module
from nanovllm.layers.attention import Attention
from nanovllm.layers.linear import Linear
from nanovllm.layers.mlp import GatedMLP
from nanovllm.layers.norm import RMSNorm
from nanovllm.layers.rope import Rope
from nanovllm.layers.stream import Stream
from nanovllm.ops.triton import layers as triton_layers
from nanovllm.ops.triton import linear as triton_linear
from nanovllm.quantization.weight_format import Plain

HIDDEN, SIZE = 96, 1024
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are compiled here")
DEVICES = [
    pytest.param("cpu", marks=interpreted),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


class Kernels(Plain):
    """Plain as on a GPU, also for tensors on a CPU."""

    def fuses(self, linear, num_rows):
        return triton_linear.fuses(linear.weight, num_rows)

    def multiply(self, linear, x, norm=None, gated=False, out=None):
        return triton_linear.linear(x, linear.weight, linear.bias, norm, gated, out)

    def add(self, linear, x, total):
        triton_linear.add_linear(total, x, linear.weight, linear.bias)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that were launched; torch's own products do not count."""
    names = []

    def noting(module, name):
        launch = getattr(module, name)
        parameters = inspect.signature(launch)

        def noted(*args, **kwargs):
            given = parameters.bind(*args, **kwargs).arguments
            epilogues = ("norm", "gated", "residual") if name == "_gemv" else ()
            fused = [
                what
                for what in epilogues
                if given.get(what, None) is not None and given[what] is not False
            ]
            names.append(" ".join([name.strip("_"), *fused]))
            return launch(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    for name in ("rms_norm", "silu_and_mul"):
        noting(triton_layers, name)
    noting(triton_linear, "_gemv")
    monkeypatch.setattr(norm_module, "ops", triton_layers)
    monkeypatch.setattr(linear_module, "ops", triton_layers)
    return names


def random_(module, device, dtype):
    for param in module.parameters():
        param.data = (torch.randn(param.shape) / param.shape[-1] ** 0.5).to(device, dtype)
    for linear in module.modules():
        if isinstance(linear, Linear):
            linear.format = Kernels()
    return module.requires_grad_(False)


def exact_norm(x, norm):
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight.double()


def exact_mlp(x, mlp):
    gate, up = (x @ mlp.gate_up_proj.weight.double().T).chunk(2, -1)
    return (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().T


FEW = ["gemv norm gated", "gemv residual"] * 2 + ["gemv norm"]
MANY = ["rms_norm", "silu_and_mul"] * 2 + ["rms_norm"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("rows", "dtype", "expected"),
    [
        (1, torch.float16, FEW),
        (4, torch.float32, FEW),
        (9, torch.float16, MANY),
        (9, torch.float32, MANY),
    ],
)
def test_what_is_fused(launches, device, rows, dtype, expected):
    sizes = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=SIZE)
    mlps = [random_(GatedMLP(sizes), device, dtype) for _ in range(2)]
    norms = [random_(RMSNorm(HIDDEN, 1e-6), device, dtype) for _ in range(3)]
    head = random_(Linear(HIDDEN, 50), device, dtype)
    start = torch.randn(rows, HIDDEN, device=device).to(dtype)
    x, exact = Stream(start.clone()), start.double()
    for norm, mlp in zip(norms, mlps, strict=False):
        x.add(mlp(x.normed(norm)))
        exact = exact + exact_mlp(exact_norm(exact, norm), mlp)
    hidden = x.total
    out = torch.empty(rows, 50, device=device, dtype=dtype)
    logits = head(Stream(hidden).normed(norms[-1])).tensor(out=out)
    assert logits is out
    assert launches == expected
    assert relative_error(hidden, exact) < 3 * tolerance(dtype)
    expected_logits = exact_norm(exact, norms[-1]) @ head.weight.double().T
    assert relative_error(logits, expected_logits) < 5 * tolerance(dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_a_norm_may_be_used_twice_but_not_after_the_stream_has_changed(launches, device):
    dtype = torch.float16
    norm = random_(RMSNorm(HIDDEN, 1e-6), device, dtype)
    first, second = (random_(Linear(HIDDEN, HIDDEN), device, dtype) for _ in range(2))
    for rows in (2, 9):
        x = Stream(torch.randn(rows, HIDDEN, device=device).to(dtype))
        normed = x.normed(norm)
        expected = exact_norm(x.total, norm)
        a, b = first(normed).tensor(), second(normed).tensor()
        for y, linear in ((a, first), (b, second)):
            exact = expected @ linear.weight.double().T
            assert relative_error(y, exact) < 2 * tolerance(dtype)
        assert launches == (["gemv norm"] * 2 if rows == 2 else ["rms_norm"])
        launches.clear()
        late = x.normed(norm)
        x.add(a)
        with pytest.raises(RuntimeError, match="before the next"):
            first(late).tensor()
        launches.clear()


@pytest.mark.parametrize("device", DEVICES)
def test_anything_else_is_a_tensor(launches, device):
    dtype = torch.float16
    linear = random_(Linear(SIZE, HIDDEN), device, dtype)
    head = random_(Linear(HIDDEN, 7), device, dtype)
    for rows in (2, 9):
        y = torch.randn(rows, SIZE, device=device).to(dtype)
        x = Stream(torch.zeros(rows, HIDDEN, device=device, dtype=dtype))
        exact = y.double() @ linear.weight.double().T
        x.add(linear(y))
        x.add(linear(y).tensor() * 2)
        other_norm = random_(OtherNorm(HIDDEN, 1e-6), device, dtype)
        a = head(x.normed(other_norm)).tensor()
        assert torch.equal(a, head(x.total + 1).tensor())
        normed = x.normed(torch.nn.Softmax(-1))
        assert relative_error(normed.tensor(), (3 * exact).softmax(-1)) < 3 * tolerance(dtype)
        assert relative_error(linear(y).tensor(gate="relu"), relu_gated(exact)) < tolerance(dtype)


class OtherNorm(RMSNorm):
    def forward(self, x):
        return x + 1


def relu_gated(x):
    gate, up = x.chunk(2, -1)
    return gate.relu() * up


def test_products_on_a_cpu_equal_float64():
    sizes = SimpleNamespace(hidden_size=HIDDEN, intermediate_size=100)
    mlp, norm = GatedMLP(sizes, bias=True), RMSNorm(HIDDEN, 1e-6)
    for module in (mlp, norm):
        for param in module.requires_grad_(False).parameters():
            param.copy_(torch.randn(param.shape) / param.shape[-1] ** 0.5)
    x = Stream(torch.randn(5, HIDDEN))
    exact = exact_norm(x.total, norm)
    gate_up = exact @ mlp.gate_up_proj.weight.double().T + mlp.gate_up_proj.bias
    gate, up = gate_up.chunk(2, -1)
    down = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.double().T + mlp.down_proj.bias
    exact = x.total.double() + down
    total = x.total
    x.add(mlp(x.normed(norm)))
    assert x.total is total
    torch.testing.assert_close(total, exact.float())
    assert ops.silu_and_mul(torch.zeros(0, 8)).shape == (0, 4)


def test_a_sum_may_read_the_norm_of_the_stream_itself():
    linear, norm = Linear(HIDDEN, HIDDEN), RMSNorm(HIDDEN, 1e-5)
    for param in (linear.weight, norm.weight):
        torch.nn.init.normal_(param)
    linear.requires_grad_(False), norm.requires_grad_(False)
    total = torch.randn(3, HIDDEN)
    x = Stream(total.clone())
    x.add(linear(x.normed(norm)))
    torch.testing.assert_close(x.total, total + linear(norm(total)).tensor())
    stale = x.normed(norm)
    x.add(total)
    with pytest.raises(RuntimeError, match="before the next"):
        x.add(linear(stale))


def test_heads_are_fused_only_where_the_kernel_computes_the_same():
    config = ModelConfig.from_hf(SHAPES["qwen3-0.6b"])
    rope = Rope(config.rope, config.head_dim, 8)

    def fuses(**changes):
        attention = Attention(config, rope, qk_norm=True)
        for name, value in changes.items():
            setattr(attention, name, value)
        return attention._rotary() is not None

    assert fuses() and fuses(q_norm=None, k_norm=None)
    assert not fuses(q_norm=None) and not fuses(k_norm=None)
    assert not fuses(k_norm=RMSNorm(config.head_dim, 5.0))
    assert not fuses(q_norm=RMSNorm(2 * config.head_dim, config.rms_norm_eps))
    assert not fuses(rope=Rope(config.rope, config.head_dim // 2, 8)) and not fuses(rope=None)
