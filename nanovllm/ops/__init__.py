"""The operations between the matrix products, by device. Layers call these names; each has its
textbook in reference.py."""

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
    "paged_attention",
    "qk_norm_rope_store",
    "rms_norm",
    "sample",
    "silu_and_mul",
]
