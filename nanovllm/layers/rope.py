"""Rotary position embedding: the table of cosines and sines, with Llama 3's frequency scaling."""

import math

import torch
from torch import nn

from nanovllm.core.model_config import RopeConfig
from nanovllm.ops import reference


class Rope(nn.Module):
    """Holds `table`: [max_positions, head_dim] float32, a row of cosines and sines for each
    position.

    Args:
        config: base, type and scaling.
        head_dim: of queries and keys.
        max_positions: positions that may occur.
    """

    table: torch.Tensor

    def __init__(self, config: RopeConfig, head_dim: int, max_positions: int):
        super().__init__()
        # Built on the CPU even while the model's parameters are still on the meta device.
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        inv_freq = 1.0 / config.theta**exponents
        if config.rope_type == "llama3":
            inv_freq = _llama3_scale(inv_freq, config)
        positions = torch.arange(max_positions, dtype=torch.float32, device="cpu")
        angles = torch.outer(positions, inv_freq)
        table = torch.cat((angles.cos(), angles.sin()), dim=-1)
        self.register_buffer("table", table, persistent=False)

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Heads [T, n, head_dim] at these positions, [T], rotated: for attention that does other
        things to heads than layers/attention.py."""
        return reference.apply_rope(x, self.table[positions])


def _llama3_scale(inv_freq: torch.Tensor, config: RopeConfig) -> torch.Tensor:
    """Llama 3.1's scaling: wavelengths longer than the original context are stretched by `factor`,
    short ones are kept, wavelengths between are blended (Meta's llama-models, apply_scaling)."""
    wavelength = 2 * math.pi / inv_freq
    turns = config.original_max_position / wavelength
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / config.factor
