"""Draws from logits as Triton kernels: first a block of the vocabulary, then a token of the block
(docs/decisions/0012). ops/__init__.py calls it for tensors on a GPU."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nanovllm.ops.reference_sampling import VOCAB_BLOCK
from nanovllm.ops.triton.blocks import blocks_of, is_kept, log2e_over
from nanovllm.ops.triton.layers import pdl_options
from nanovllm.ops.triton.limits import find_limits


@triton.jit
def _mix32(x):
    """murmur3's 32-bit finalizer, as in reference_sampling.py."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _log2_noise(first, second, ids):
    """reference_sampling.gumbel_noise / log(2); first, second: the row's keys in uint32."""
    bits = _mix32(_mix32(ids.to(tl.uint32) * 0x9E3779B9 + first) ^ second)
    u = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10  # 2^-32
    u = tl.minimum(u, 0.999999940395355)  # 1 - 2^-24
    # -log(1 - u). For small u, which decide the draw, by its series: 1 - u would lose their bits.
    series = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log2(tl.where(u < 0.01, series, -tl.log(1.0 - u)))


@triton.jit
def _log2_weights(values, scale):
    """reference_sampling.log_weights / log(2); scale: log2(e) / temperature, infinite for greedy
    rows, in which only the best logits are above -inf."""
    best = tl.max(values, 0)
    return tl.where(values == best, 0.0, (values - best) * scale)


@triton.jit
def _first_of_the_best(values, ids, last):
    """The first id of the largest value; `last` if all are NaN."""
    return tl.min(tl.where(values == tl.max(values, 0), ids, last), 0)


@triton.jit
def sample_kernel(
    token_ids, logits, temperature, noise_keys, bests, sums, lowest, last,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each CTA draws one row's block, and the token in the block."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    scale = log2e_over(t)
    first = tl.load(noise_keys + row * 2).to(tl.uint32)
    second = tl.load(noise_keys + row * 2 + 1).to(tl.uint32)

    blocks = tl.arange(0, BLOCKS)
    there = blocks < NUM_BLOCKS
    best = tl.load(bests + row * NUM_BLOCKS + blocks, mask=there, other=float("-inf"))
    total = tl.load(sums + row * NUM_BLOCKS + blocks, mask=there, other=1.0)
    weights = _log2_weights(best, scale) + tl.log2(total)
    if t > 0:
        weights += _log2_noise(first, second, -1 - blocks)
    weights = tl.where(there, weights, float("-inf"))
    block = _first_of_the_best(weights, blocks, NUM_BLOCKS - 1)

    tokens = block * BLOCK + tl.arange(0, BLOCK)
    ok = tokens < VOCAB
    values = tl.load(logits + row * VOCAB + tokens, mask=ok, other=float("-inf"))
    if lowest is not None:
        kept = is_kept(values, tokens, lowest, last, row)
        values = tl.where(kept, values, float("-inf"))
    weights = _log2_weights(values.to(tl.float32), scale)
    if t > 0:
        weights += _log2_noise(first, second, tokens)
    weights = tl.where(ok, weights, float("-inf"))
    tl.store(token_ids + row, _first_of_the_best(weights, tokens, VOCAB - 1).to(tl.int64))


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    noise_keys: torch.Tensor,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
) -> torch.Tensor:
    """As reference_sampling.sample."""
    num_rows, vocab = logits.shape
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows == 0:
        return token_ids
    lowest = last = None
    if top_k is not None or top_p is not None or min_p is not None:
        top_k = (
            temperature.new_full((num_rows,), vocab, dtype=torch.int64) if top_k is None else top_k
        )
        top_p = torch.ones_like(temperature) if top_p is None else top_p
        min_p = torch.zeros_like(temperature) if min_p is None else min_p
        lowest, last = find_limits(logits, temperature, top_k, top_p, min_p)
    blocks = blocks_of(logits, temperature, lowest, last)
    sample_kernel[(num_rows,)](
        token_ids, logits, temperature, noise_keys, blocks.bests, blocks.sums, lowest, last,
        VOCAB=vocab, BLOCK=VOCAB_BLOCK, num_warps=8, **blocks.sizes, **pdl_options(logits.device),
    )  # fmt: skip
    return token_ids
