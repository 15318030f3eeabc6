"""Products with plain and packed weights against float64, at every size of batch."""

import pytest
import torch

from nanovllm.layers.linear import Linear
from nanovllm.ops import platform
from nanovllm.quantization.weight_format import packs_weights

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_linear(num_in, num_out, has_bias, dtype):
    linear = Linear(num_in, num_out, bias=has_bias).to(dtype).requires_grad_(False)
    linear.weight.copy_(torch.randn(num_out, num_in) / num_in**0.5)
    if has_bias:
        linear.bias.copy_(torch.randn(num_out))
    return linear


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (33, 7), (128, 1000)])
def test_linear_is_the_product(num_in, num_out, has_bias, dtype):
    linear = make_linear(num_in, num_out, has_bias, dtype)
    weight = linear.weight.double()
    bias = linear.bias.double() if has_bias else 0
    for is_prepared in (False, True):
        if is_prepared:
            linear.format = linear.format.prepare(linear)
            assert linear.weight.is_mkldnn == packs_weights(CPU, dtype)
        for num_tokens in (0, 1, 2, 7, 31, 32, 33, 200):
            x = torch.randn(num_tokens, num_in).to(dtype)
            y = linear(x).tensor()
            assert y.dtype == dtype and y.shape == (num_tokens, num_out)
            tolerance = dict(rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
            assert torch.allclose(y.double(), x.double() @ weight.T + bias, **tolerance)


def test_linear_takes_rows_that_are_not_contiguous():
    linear, x = make_linear(16, 24, False, torch.float32), torch.randn(5, 48)[:, 8:24]
    expected = x @ linear.weight.T
    linear.format = linear.format.prepare(linear)
    assert torch.allclose(linear(x).tensor(), expected, atol=1e-5)


def test_float32_is_packed_where_the_cpu_has_avx():
    has_avx = "avx2" in platform._cpu_flags()
    assert packs_weights(CPU, torch.float32) == (has_avx and torch.backends.mkldnn.is_available())
    assert not packs_weights(torch.device("cuda"), torch.float32)
    assert not packs_weights(CPU, torch.float64)
