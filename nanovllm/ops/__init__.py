"""The operations between the matrix products, by device. Layers call these names; and those
products; each has its textbook in reference.py or torch."""

from nanovllm.ops.cpu import linear, pack_weight, packs_weights
from nanovllm.ops.reference import (
    add_rms_norm,
    paged_attention,
    qk_norm_rope_store,
    rms_norm,
    sample,
    silu_and_mul,
)

__all__ = [
    "add_rms_norm",
    "linear",
    "pack_weight",
    "packs_weights",
    "paged_attention",
    "qk_norm_rope_store",
    "rms_norm",
    "sample",
    "silu_and_mul",
]
