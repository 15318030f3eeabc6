"""The residual stream, and norms of it that are computed where they are used.

    x.add(self.self_attn(x.normed(self.input_layernorm), batch, kv))
    x.add(self.mlp(x.normed(self.post_attention_layernorm)))

The layers of a model (models/) write this; layers/linear.py decides what becomes one kernel, and
anything else gets a plain tensor from `tensor()`.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from nanovllm.layers.linear import Product


@dataclass(slots=True)
class Stream:
    """The residual stream of a forward.

    Attributes:
        total: [T, hidden], changed in place.
        version: how many times the stream was added to.
    """

    total: torch.Tensor
    version: int = 0

    def normed(self, norm: nn.Module) -> "Normed":
        """norm(x), which is computed where it is used, before the next `add`."""
        return Normed(self, norm, self.version)

    def add(self, y: "torch.Tensor | Product") -> None:
        """x += y, for a tensor or a product, [T, hidden]."""
        if isinstance(y, torch.Tensor):
            self.total.add_(y)
        else:
            x = y.x if isinstance(y.x, torch.Tensor) else y.x.tensor()
            y.linear.format.add(y.linear, x, self.total)
        self.version += 1


@dataclass(slots=True)
class Normed:
    """A norm of the stream that is not computed yet. It may be used several times, as by attention
    and MLP beside each other."""

    stream: Stream
    norm: nn.Module
    version: int
    value: torch.Tensor | None = field(default=None, init=False)

    def tensor(self) -> torch.Tensor:
        """[T, hidden], computed once."""
        if self.value is None:
            self.check()
            self.value = self.norm(self.stream.total)
        return self.value

    def check(self) -> None:
        """Raise RuntimeError if the stream is not what it was."""
        if self.version != self.stream.version:
            raise RuntimeError("use x.normed(...) before the next x.add(...)")
