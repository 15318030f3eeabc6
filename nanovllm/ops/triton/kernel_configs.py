"""Layouts of the Triton kernels: tables made offline, so that nothing is tuned at start. Modules
that launch kernels read them.

Measured on an H200 (docs/log.md); every entry stays below the 99 KB of shared memory that a CTA may
have on the smallest GPUs of capability 8.0 and up.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

MAX_SHARED_BYTES = 99 * 1024
MAX_HEAD_DIM = 256

# Elements for each CTA, the same on all GPUs.
SILU_BLOCK = 1024
ROWS_BLOCK = 128  # rows, in the kernels for the rows' state
SEARCH_BLOCK, SEARCH_WARPS = 2048, 8  # logits, in the kernels with a CTA for each row of logits
GROUP = 128  # tokens in a group of logits; its best logit says whether the group is read again
CANDIDATES = 2048  # largest number of logits that are searched instead of the whole row
HEADS_PER_PROGRAM = 8  # heads for each CTA of qk_norm_rope_store

# Shared prefixes have two launches of their own in each layer, which must save this many bytes.
MIN_GAIN_BYTES = 32 * 2**20


# Triton's own versions of these two functions take 2 us a call, in each of many launches.
def cdiv(a: IntOrArray, b: IntOrArray | int) -> IntOrArray:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class AttentionConfig:
    """A layout of the attention kernel.

    Attributes:
        block_m: query rows in a tile: tokens x query heads that share a KV head.
        block_n: keys in a turn of the loop.
        num_warps, num_stages: Triton's: warps of a CTA, and depth of the software pipeline.
        programs_per_sm: CTAs that keep an SM busy; tiles are split until each SM has this number.
        min_keys: smallest number of keys in a split-off part, a multiple of block_n.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_keys: int


def _by_name(**values: tuple[int, ...]) -> dict[str, AttentionConfig]:
    return {name: AttentionConfig(*value) for name, value in values.items()}


# By itemsize and by the bytes of a head's key, padded to a power of two; attention_configs explains
# the names. float32 is multiplied without tensor cores, from registers: small tiles.
ATTENTION = {
    (2, 128): _by_name(
        short=(16, 128, 4, 3, 2, 128),
        few=(16, 128, 4, 1, 1, 128),
        crowd=(16, 32, 1, 5, 8, 128),
        long=(128, 64, 4, 3, 4, 256),
        shared=(64, 64, 4, 3, 2, 256),
    ),
    (2, 256): _by_name(
        short=(16, 64, 4, 3, 2, 64),
        few=(16, 64, 8, 1, 1, 64),
        crowd=(16, 16, 1, 5, 8, 128),
        long=(128, 64, 4, 3, 4, 256),
        shared=(64, 64, 4, 2, 1, 256),
    ),
    (2, 512): _by_name(short=(16, 32, 4, 3, 6, 128), long=(64, 32, 4, 2, 4, 256)),
    (4, 256): _by_name(short=(16, 32, 4, 2, 6, 128), long=(32, 32, 4, 2, 4, 256)),
    (4, 512): _by_name(short=(16, 32, 4, 2, 6, 128), long=(32, 32, 4, 2, 4, 256)),
    (4, 1024): _by_name(short=(16, 16, 4, 2, 6, 128), long=(32, 16, 4, 2, 4, 256)),
}
CROWD_PROGRAMS_PER_SM = 15  # smallest number of CTAs for the layout "crowd"
FEW_PROGRAMS_PER_SM, FEW_KEYS_PER_SM = 1 / 2, 256  # largest numbers for the layout "few"
# The layout "deep" is for batches in which a CTA would get DEEP_KEYS keys or more, if they have few
# sequences, or one with more than DEEP_SHARE of that: a CTA with a whole long sequence ends last.
DEEP_KEYS, DEEP_SHARE, DEEP_PROGRAMS_PER_SM = 3072, 3 / 4, 6
SHARED_PROGRAMS_PER_SM = 2
# Largest number of keys that the tiles of chunks read in a CUDA graph, where a tile has few tokens:
# with more, an eager step is faster.
MIXED_KEYS = 2**18
# Decodes come straight from the projection to attention if all CTAs run at a time: with more CTAs,
# the norms and RoPE of one delay the next by more than a kernel of their own takes.
PROJECTED_PROGRAMS_PER_SM = 4


def attention_configs(head_dim: int, itemsize: int) -> dict[str, AttentionConfig]:
    """Layouts by purpose, in the order of their launches:

    - shared: keys that decodes share, read by no more CTAs than run at a time: each further part is
      one more partial result for every decode, and leaves less room for CTAs of the next launch.
    - short: short queries, mostly decodes.
    - few: short queries of few sequences with few keys, where latency counts: small parts, many
      warps, and for 16 bits no pipeline, so that keys go straight to registers.
    - deep: short queries with long contexts, in more parts than `short`. They never come from the
      projection, which is up to a fifth slower here.
    - crowd: short queries of many sequences, 15 CTAs an SM or more. In small tiles many CTAs hide
      each other's latency, and short contexts fill whole tiles.
    - long: chunks.

    Raises:
        ValueError: head_dim is too large.
    """
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"on a GPU head_dim is at most {MAX_HEAD_DIM}, this model's is {head_dim}; "
            f"device='cpu' takes any"
        )
    configs = ATTENTION[itemsize, max(64, next_power_of_2(head_dim)) * itemsize]
    short, long = configs["short"], configs["long"]
    shared = replace(long, programs_per_sm=SHARED_PROGRAMS_PER_SM)
    deep = replace(short, programs_per_sm=max(short.programs_per_sm, DEEP_PROGRAMS_PER_SM))
    return {"shared": shared, "few": short, "deep": deep, "crowd": short, **configs}


@dataclass(frozen=True)
class GemvConfig:
    """A layout of the GEMV kernel.

    Attributes:
        block_n: outputs of a CTA; gate and up count once.
        block_k: inputs in a turn of the loop.
        num_warps: Triton's.
    """

    block_n: int
    block_k: int
    num_warps: int


MAX_GEMV_ROWS = 4


def max_gemv_rows(num_weights: int) -> int:
    """Largest number of input rows for which the GEMV kernel is faster than cuBLAS with separate
    kernels for norm and gate."""
    return MAX_GEMV_ROWS if num_weights <= 2**24 else 1


def gemv_config(size: int, itemsize: int, gated: bool) -> GemvConfig:
    """The layout for inputs of `size` elements: one warp keeps enough bytes in flight for short
    rows of a weight, eight for long rows."""
    block_n = 2 if gated else 4
    if size <= 1024:
        return GemvConfig(block_n, min(next_power_of_2(size), 1024 // itemsize), 1)
    return GemvConfig(block_n, 4096 // itemsize, 4 if gated else 8)
