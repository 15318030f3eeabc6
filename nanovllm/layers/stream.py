"""The residual stream, and what is read from it and added to it lazily, so that devices can fuse.

    x.add(self.self_attn(x.normed(self.input_layernorm), batch, kv))
    x.add(self.mlp(x.normed(self.post_attention_layernorm)))

A layer (models/) writes this; layers/linear.py decides what becomes one kernel. `tensor()` of each
object gives a plain tensor, for all that no kernel fuses.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from nanovllm import ops
from nanovllm.layers.norm import RMSNorm

if TYPE_CHECKING:
    from nanovllm.layers.linear import Product


@dataclass(slots=True)
class Stream:
    """The residual stream of a forward.

    Attributes:
        total: [T, hidden], changed in place.
        parts: [n, T, hidden] float32, partial sums that are still to be added to `total`; the next
            norm adds them, because it reads the total anyway. None: no such sums.
        version: how many times the stream was added to.
    """

    total: torch.Tensor
    parts: torch.Tensor | None = None
    version: int = 0

    def normed(self, norm: nn.Module) -> "Normed":
        """norm(x), computed where it is used: before the stream is added to."""
        return Normed(self, norm, self.version)

    def add(self, y: "torch.Tensor | Product") -> None:
        """x += y, for a tensor or a product, [T, hidden]."""
        total = self.tensor()
        self.version += 1
        if isinstance(y, torch.Tensor):
            total.add_(y)
        else:
            self.parts = y.add_to(total)

    def tensor(self) -> torch.Tensor:
        """[T, hidden], the stream itself: the next `add` changes it."""
        if self.parts is not None:
            ops.add_parts(self.total, self.parts)
            self.parts = None
        return self.total


@dataclass(slots=True)
class Normed:
    """A norm of the stream that is not computed yet. It may be used several times (parallel blocks
    of attention and MLP)."""

    stream: Stream
    norm: nn.Module
    version: int
    value: torch.Tensor | None = field(default=None, init=False)

    def tensor(self) -> torch.Tensor:
        """[T, hidden], in new memory, computed once."""
        if self.value is not None:
            return self.value
        stream, norm = self.stream, self.norm
        assert self.version == stream.version, "use x.normed(...) before the next x.add(...)"
        if isinstance(norm, RMSNorm):
            self.value = ops.rms_norm(stream.total, norm.weight, norm.eps, stream.parts)
            stream.parts = None
        else:
            self.value = norm(stream.tensor())
        return self.value

    def for_kernel(self) -> tuple[torch.Tensor, tuple[torch.Tensor, float] | None]:
        """What a kernel takes that computes the norm itself: the stream's total and the RMSNorm's
        weight and eps; for every other norm its result and None."""
        if self.value is not None or not isinstance(self.norm, RMSNorm):
            return self.tensor(), None
        assert self.version == self.stream.version, "use x.normed(...) before the next x.add(...)"
        return self.stream.tensor(), (self.norm.weight, self.norm.eps)
