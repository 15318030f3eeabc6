"""Products with packed weights against float64, at every size of batch."""

import pytest
import torch

from nanovllm import ops
from nanovllm.ops import platform

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("num_in", "num_out"), [(64, 96), (33, 7), (128, 1000)])
def test_linear_is_the_product(num_in, num_out, has_bias, dtype):
    weight = (torch.randn(num_out, num_in) / num_in**0.5).to(dtype)
    bias = torch.randn(num_out).to(dtype) if has_bias else None
    packed = ops.pack_weight(weight)
    assert packed.is_mkldnn == ops.packs_weights(CPU, dtype)
    for num_tokens in (0, 1, 2, 7, 31, 32, 33, 200):
        x = torch.randn(num_tokens, num_in).to(dtype)
        expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        for w in (weight, packed):
            y = ops.linear(x, w, bias)
            assert y.dtype == dtype and y.shape == (num_tokens, num_out)
            assert torch.allclose(
                y.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
            )


def test_linear_takes_rows_that_are_not_contiguous():
    weight, x = torch.randn(24, 16), torch.randn(5, 48)[:, 8:24]
    assert torch.allclose(ops.linear(x, ops.pack_weight(weight), None), x @ weight.T, atol=1e-5)


def test_float32_is_packed_where_the_cpu_has_avx():
    has_avx = "avx2" in platform._cpu_flags()
    assert ops.packs_weights(CPU, torch.float32) == (
        has_avx and torch.backends.mkldnn.is_available()
    )
    assert not ops.packs_weights(torch.device("cuda"), torch.float32)
    assert not ops.packs_weights(CPU, torch.float64)
