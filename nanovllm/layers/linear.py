"""Matrix products with weights, plain and packed, and the vocabulary's two: embedding and head."""

import torch
import torch.nn.functional as F
from torch import nn

from nanovllm import ops
from nanovllm.layers.norm import RMSNorm
from nanovllm.ops.batch import Residual


class Linear(nn.Module):
    """x @ weight.T + bias. Several projections of the same input may be packed in one weight, row
    after row; weights.py fills each from its own tensor of the checkpoint.

    Args:
        in_features: size of the input.
        sizes: rows of each projection.
        bias: whether they have biases.
    """

    def __init__(self, in_features: int, *sizes: int, bias: bool = False):
        super().__init__()
        self.sizes = sizes
        self.weight = nn.Parameter(torch.empty(sum(sizes), in_features))
        self.bias = nn.Parameter(torch.empty(sum(sizes))) if bias else None

    def forward(
        self,
        x: torch.Tensor | Residual,
        norm: RMSNorm | None = None,
        gated: bool = False,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The product, with what stands before and after it: of norm(x), as silu(gate) * up, or put
        into `out`."""
        parts = None if norm is None else (norm.weight, norm.eps)
        return ops.linear(x, self.weight, self.bias, parts, gated, out)

    def add_to(self, residual: Residual, x: torch.Tensor) -> None:
        """Add the product of x."""
        ops.add_linear(residual, x, self.weight, self.bias)


class Embedding(nn.Module):
    """A vector for each token id."""

    def __init__(self, vocab_size: int, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self.weight)
