"""Norms. Of the residual stream they are computed by layers/stream.py, which fuses RMSNorm with
what follows; a norm of anything else is a call."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import ops

if TYPE_CHECKING:
    from nanovllm.layers.linear import Product


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale (Zhang and Sennrich 2019).

    Args:
        size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: "torch.Tensor | Product") -> torch.Tensor:
        x = x if isinstance(x, torch.Tensor) else x.tensor()
        return ops.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Normalisation by mean and variance, in float32 (Ba et al. 2016).

    Args:
        size: of the last dimension.
        eps: added to the variance.
        bias: whether a learned bias is added.
    """

    def __init__(self, size: int, eps: float, *, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.bias = nn.Parameter(torch.empty(size)) if bias else None
        self.eps = eps

    def forward(self, x: "torch.Tensor | Product") -> torch.Tensor:
        x = x if isinstance(x, torch.Tensor) else x.tensor()
        bias = None if self.bias is None else self.bias.float()
        y = F.layer_norm(x.float(), self.weight.shape, self.weight.float(), bias, self.eps)
        return y.to(x.dtype)
