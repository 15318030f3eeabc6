"""The pass over rows of logits that draws, limits and log-probabilities begin with, and functions
of a logit for their kernels: its key, its softmax weight, whether it is within the row's limits.

sampling.py and limits.py call it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.ops.reference_sampling import VOCAB_BLOCK
from nanovllm.ops.triton.kernel_configs import GROUP, cdiv, next_power_of_2
from nanovllm.ops.triton.layers import pdl_options


@triton.jit
def log2e_over(t):
    return tl.where(t > 0, 1.4426950408889634 / t, float("inf"))


@triton.jit
def keys_of(values):
    """Whole numbers in the order of the logits; neighbours of a dtype differ by 1."""
    if values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFF)
    return tl.where(keys == -1, 0, keys)  # -0 is 0


@triton.jit
def value_of(key, dtype: tl.constexpr):
    """The logit of a key, in float32."""
    if dtype == tl.float32:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = key ^ ((key >> 31) & 0x7FFF)
        value = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def weights_of(values, best, scale):
    """Softmax weights; the best logit's is 1, also if it is infinite."""
    values = values.to(tl.float32)
    return tl.exp2(tl.where(values == best, 0.0, (values - best) * scale))


@triton.jit
def is_kept(values, tokens, lowest, last, row):
    """Whether tokens are within a row's limits, as find_limits gives them."""
    keys, limit = keys_of(values), tl.load(lowest + row)
    return (keys > limit) | ((keys == limit) & (tokens <= tl.load(last + row)))


@triton.jit
def sample_blocks_kernel(
    bests, sums, group_bests, logits, temperature, lowest, last,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each CTA computes, for one block of a row, the best logit and the sum of the softmax weights,
    of which the best is 1; only of tokens within the row's limits, if `lowest` is not None. If
    `group_bests` is not None, also the best logit of each group of tokens."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = log2e_over(tl.load(temperature + row))
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf"))
    if lowest is not None:
        kept = is_kept(values, tokens, lowest, last, row)
        values = tl.where(kept, values, float("-inf"))
    if group_bests is not None:
        groups = block * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
        best_of_each = tl.max(tl.reshape(values, (BLOCK // GROUP, GROUP)).to(tl.float32), 1)
        tl.store(group_bests + row * NUM_GROUPS + groups, best_of_each, mask=groups < NUM_GROUPS)
    values = values.to(tl.float32)
    best = tl.max(values, 0)
    total = tl.sum(tl.exp2((values - best) * scale), 0)
    # NaN is inf - inf, or 0 * inf in a greedy row, which takes the first of its best blocks.
    total = tl.where(total == total, total, 1.0)
    tl.store(bests + row * tl.num_programs(1) + block, best)
    tl.store(sums + row * tl.num_programs(1) + block, total)


@dataclass
class Blocks:
    """The results of one pass over rows of logits.

    Attributes:
        bests, sums: [n, blocks] float32, the best logit of each block of VOCAB_BLOCK tokens, and
            the sum of its softmax weights, of which the best is 1.
        group_bests: [n, groups], the best of each GROUP of tokens, in the logits' dtype; None: not
            wanted.
    """

    bests: torch.Tensor
    sums: torch.Tensor
    group_bests: torch.Tensor | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Constants of kernels that read the results."""
        num_blocks = self.bests.shape[1]
        sizes = {"NUM_BLOCKS": num_blocks, "BLOCKS": next_power_of_2(num_blocks)}
        if self.group_bests is not None:
            num_groups = self.group_bests.shape[1]
            sizes |= {"NUM_GROUPS": num_groups, "GROUPS": next_power_of_2(num_groups)}
            sizes["GROUP"] = GROUP
        return sizes


def blocks_of(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    lowest: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
    with_groups: bool = False,
) -> Blocks:
    num_rows, vocab = logits.shape
    num_blocks, num_groups = cdiv(vocab, VOCAB_BLOCK), cdiv(vocab, GROUP)
    bests, sums = (torch.empty(num_rows, num_blocks, device=logits.device) for _ in range(2))
    group_bests = logits.new_empty(num_rows, num_groups) if with_groups else None
    sample_blocks_kernel[(num_rows, num_blocks)](
        bests, sums, group_bests, logits, temperature, lowest, last, VOCAB=vocab,
        BLOCK=VOCAB_BLOCK, GROUP=GROUP, NUM_GROUPS=num_groups, num_warps=4,
        **pdl_options(logits.device),
    )  # fmt: skip
    return Blocks(bests, sums, group_bests)
