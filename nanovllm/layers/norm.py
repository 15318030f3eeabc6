"""RMSNorm. Where a product follows, it is handed to layers/linear.py, which may fuse the two."""

import torch
from torch import nn

from nanovllm import ops


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale.

    Args:
        size: of the last dimension.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
