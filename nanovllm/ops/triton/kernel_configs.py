"""How the Triton kernels are laid out on a GPU: a table made offline, so that nothing is tuned at
start.

Measured on an H200 (docs/log.md); every entry stays below the 99 KB of shared memory that a
program may have on the smallest GPUs of capability 8.0 and up.
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

MAX_SHARED_BYTES = 99 * 1024
MAX_HEAD_DIM = 256

# Elements a program, the same on all GPUs.
SILU_BLOCK = 1024
ROWS_BLOCK = 128  # of the rows' state
SEARCH_BLOCK, SEARCH_WARPS = 2048, 8  # of kernels that a row of logits has a program of
GROUP = 128  # tokens whose best logit says whether the others are worth a look
CANDIDATES = 2048  # logits that are looked at instead of all
HEADS_PER_PROGRAM = 8  # of qk_norm_rope_store

# They have two launches of their own in each layer, which must save microseconds of reading.
MIN_GAIN_BYTES = 32 * 2**20


# Triton's own of these two take 2 us a call, in each of many launches.
def cdiv(a: IntOrArray, b: IntOrArray | int) -> IntOrArray:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest that is not less than n, of 1 or more."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class AttentionConfig:
    """One way to run the attention kernel.

    Attributes:
        block_m: query rows a tile: tokens x query heads that share a key/value head.
        block_n: keys a turn of the loop.
        num_warps, num_stages: Triton's, warps a program and depth of the software pipeline.
        programs_per_sm: programs that keep a multiprocessor busy; tiles are split to get as many.
        min_keys: keys a split-off part has at least, a multiple of block_n.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    min_keys: int


def _by_name(**values: tuple[int, ...]) -> dict[str, AttentionConfig]:
    return {name: AttentionConfig(*value) for name, value in values.items()}


# By itemsize and the bytes of a head's key, padded to a power of two; the names are
# attention_configs'. float32 is multiplied without tensor cores, from registers: small tiles.
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
CROWD_PROGRAMS_PER_SM = 15  # or more
FEW_PROGRAMS_PER_SM, FEW_KEYS_PER_SM = 1 / 2, 256  # or fewer, of sequences and all their keys
# Where programs have so many keys on average, and there are few sequences or one that has nearly as
# many, all are divided for more programs: who had that one whole would end last, alone.
DEEP_KEYS, DEEP_SHARE, DEEP_PROGRAMS_PER_SM = 3072, 3 / 4, 6
SHARED_PROGRAMS_PER_SM = 2
# Keys that the tiles of chunks may read in a CUDA graph, where a tile has few tokens: beyond, that
# takes longer than launching a step kernel by kernel.
MIXED_KEYS = 2**18
# Decodes come right from the projection to attention where it has no more programs than run at a
# time: with more, they wait for the norms and RoPE of others longer than a kernel for them takes.
PROJECTED_PROGRAMS_PER_SM = 4


def attention_configs(head_dim: int, itemsize: int) -> dict[str, AttentionConfig]:
    """By what they are for, in the order of their launches:

    - shared: keys that decodes share, which are read by no more programs than fit at a time: every
      further part is one more partial result for each decode, and the fewer, the more programs of
      the next launch run beside them.
    - short: short queries, decodes above all.
    - few: those of so few sequences, with so few keys, that latency is all: parts of a block or
      some, all warps on it, and for 16 bits no pipeline, so that keys go right to registers.
    - deep: those of long contexts, in more parts where `short` has few. They are never from the
      projection: that is up to a fifth slower here.
    - crowd: those of so many that each multiprocessor gets 15 programs or more. In smaller blocks
      many programs hide each other's waiting, and short contexts fill whole blocks.
    - long: chunks.

    Raises:
        ValueError: there is no entry for such heads.
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
    """One way to run the product of few rows with a weight.

    Attributes:
        block_n: outputs a program; gate and up count once.
        block_k: inputs it reads at a time, one block after another.
        num_warps: Triton's.
    """

    block_n: int
    block_k: int
    num_warps: int


MAX_GEMV_ROWS = 4


def max_gemv_rows(num_weights: int) -> int:
    """Input rows up to which the kernel is faster than cuBLAS and kernels for norm and gate."""
    return MAX_GEMV_ROWS if num_weights <= 2**24 else 1


def gemv_config(size: int, itemsize: int, gated: bool) -> GemvConfig:
    """For inputs of `size` elements. As many bytes are on their way with one warp for short rows of
    a weight as with eight for long ones."""
    block_n = 2 if gated else 4
    if size <= 1024:
        return GemvConfig(block_n, min(next_power_of_2(size), 1024 // itemsize), 1)
    return GemvConfig(block_n, 4096 // itemsize, 4 if gated else 8)
