"""Sampling as Triton kernels: draws, the limits that they keep to, and the most likely tokens. No
kernel sorts a vocabulary.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.ops.kernel_configs import SEARCH_BLOCK, SEARCH_WARPS
from nanovllm.ops.reference_sampling import VOCAB_BLOCK
from nanovllm.ops.triton_ops import pdl_options


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
    rows, of which only the best are above -inf."""
    best = tl.max(values, 0)
    return tl.where(values == best, 0.0, (values - best) * scale)


@triton.jit
def _first_of_the_best(values, ids, last):
    """The first id of the largest value, `last` at most: among NaN there is none."""
    return tl.min(tl.where(values == tl.max(values, 0), ids, last), 0)


@triton.jit
def _log2e_over(t):
    return tl.where(t > 0, 1.4426950408889634 / t, float("inf"))


@triton.jit
def _keys(values):
    """Whole numbers in the order of the logits; neighbours of a dtype differ by 1."""
    if values.dtype == tl.float32:
        bits = values.to(tl.int32, bitcast=True)
        keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    else:
        bits = values.to(tl.int16, bitcast=True).to(tl.int32)
        keys = bits ^ ((bits >> 31) & 0x7FFF)
    return tl.where(keys == -1, 0, keys)  # -0 is 0


@triton.jit
def _value(key, dtype: tl.constexpr):
    """The logit of a key, in float32."""
    if dtype == tl.float32:
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    else:
        bits = key ^ ((key >> 31) & 0x7FFF)
        value = bits.to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
    return value


@triton.jit
def _weights(values, best, scale):
    """Softmax weights, of which the best one's is 1, also if it is infinite."""
    values = values.to(tl.float32)
    return tl.exp2(tl.where(values == best, 0.0, (values - best) * scale))


@triton.jit
def _is_kept(values, tokens, lowest, last, row):
    """Whether tokens are within a row's limits, as find_limits gives them."""
    keys, limit = _keys(values), tl.load(lowest + row)
    return (keys > limit) | ((keys == limit) & (tokens <= tl.load(last + row)))


@triton.jit
def sample_blocks_kernel(
    bests, sums, logits, temperature, lowest, last,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program takes the best logit of one block of a row, and the sum of the block's softmax
    weights, of which the best is 1; of the tokens within the row's limits, if `lowest` is there."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    scale = _log2e_over(tl.load(temperature + row))
    tokens = block * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(logits + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf"))
    if lowest is not None:
        kept = _is_kept(values, tokens, lowest, last, row)
        values = tl.where(kept, values, float("-inf"))
    values = values.to(tl.float32)
    best = tl.max(values, 0)
    total = tl.sum(tl.exp2((values - best) * scale), 0)
    # NaN is inf - inf, or 0 * inf in a greedy row, which takes the first of its best blocks.
    total = tl.where(total == total, total, 1.0)
    tl.store(bests + row * tl.num_programs(1) + block, best)
    tl.store(sums + row * tl.num_programs(1) + block, total)


@triton.jit
def sample_kernel(
    token_ids, logits, temperature, noise_keys, bests, sums, lowest, last,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program draws one row's block and in it the token."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    scale = _log2e_over(t)
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
        kept = _is_kept(values, tokens, lowest, last, row)
        values = tl.where(kept, values, float("-inf"))
    weights = _log2_weights(values.to(tl.float32), scale)
    if t > 0:
        weights += _log2_noise(first, second, tokens)
    weights = tl.where(ok, weights, float("-inf"))
    tl.store(token_ids + row, _first_of_the_best(weights, tokens, VOCAB - 1).to(tl.int64))


@triton.jit
def _above(
    logits, a, b, c, best, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr
):  # fmt: skip
    """How many tokens of a row have keys of a, b and c at least; with MASS the sums of their
    softmax weights."""
    above_a = tl.zeros((BLOCK,), tl.float32)
    above_b = tl.zeros((BLOCK,), tl.float32)
    above_c = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        ok = tokens < VOCAB
        values = tl.load(logits + tokens, mask=ok, other=float("-inf"))
        keys = _keys(values)
        weights = ok.to(tl.float32)  # sums of ones are exact up to 2^24
        if MASS:
            weights *= _weights(values, best, scale)
        above_a += tl.where(keys >= a, weights, 0.0)
        above_b += tl.where(keys >= b, weights, 0.0)
        above_c += tl.where(keys >= c, weights, 0.0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def _search(
    logits, target, low, high, best, scale,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, GALLOP: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The highest key, of those from `low` to `high`, at or above which lie `target` tokens, or
    tokens of so much weight; `low` if there are not so many. Each turn reads the row once and
    leaves a quarter; the first one looks close to the best, where most limits are."""
    a = tl.maximum(high - 15 * GALLOP, low + 1)
    b = tl.maximum(high - 255 * GALLOP, low + 1)
    c = tl.maximum(high - 4095 * GALLOP, low + 1)
    while low < high:
        above_a, above_b, above_c = _above(
            logits, a.to(tl.int32), b.to(tl.int32), c.to(tl.int32), best, scale, VOCAB, BLOCK, MASS
        )
        if above_a >= target:
            low = a
        elif above_b >= target:
            low, high = b, a - 1
        elif above_c >= target:
            low, high = c, b - 1
        else:
            high = c - 1
        a = low + (3 * (high - low) + 3) // 4
        b = low + (high - low + 1) // 2
        c = low + (high - low + 3) // 4
    return low


@triton.jit
def _lowest_likely(logits, least, best, scale, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest key of a softmax weight of `least` or more."""
    lowest = tl.full((BLOCK,), 2**31 - 1, tl.int32)
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        values = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf"))
        is_likely = (tokens < VOCAB) & (_weights(values, best, scale) >= least)
        lowest = tl.minimum(lowest, tl.where(is_likely, _keys(values), 2**31 - 1))
    return tl.min(lowest, 0)


@triton.jit
def _place(logits, key, number, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Which token is the so-manieth with a key; VOCAB if there are fewer."""
    place, seen = VOCAB, 0
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        values = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("-inf"))
        is_equal = ((_keys(values) == key) & (tokens < VOCAB)).to(tl.int32)
        count = tl.sum(is_equal, 0)
        if (seen < number) & (seen + count >= number):
            is_it = (is_equal > 0) & (seen + tl.cumsum(is_equal, 0) == number)
            place = tl.min(tl.where(is_it, tokens, VOCAB), 0)
        seen += count
    return place


@triton.jit
def limits_kernel(
    lowest, last, logits, temperature, top_k, top_p, min_p, bests,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program finds what one row's limits leave: see find_limits."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    scale = _log2e_over(t)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    logits += row * VOCAB
    dtype: tl.constexpr = logits.dtype.element_ty
    GALLOP: tl.constexpr = 65536 if dtype == tl.float32 else 1
    low = tl.full((), -(2**31) if dtype == tl.float32 else -(2**15), tl.int64)
    place = VOCAB
    if (t > 0) & ((k < VOCAB) | (p < 1) | (least > 0)):
        blocks = tl.arange(0, BLOCKS)
        bests += row * NUM_BLOCKS
        block_bests = tl.load(bests + blocks, mask=blocks < NUM_BLOCKS, other=float("-inf"))
        best = tl.max(block_bests, 0)
        high = _keys(best.to(dtype)).to(tl.int64)
        ties = tl.full((), VOCAB, tl.int64)  # of the tokens with the lowest key so many stay
        if least > 0:
            low = _lowest_likely(logits, least, best, scale, VOCAB, BLOCK).to(tl.int64)
        if k < VOCAB:
            target = k.to(tl.float32)
            low = _search(logits, target, low, high, best, scale, VOCAB, BLOCK, GALLOP, False)
            next_key = (low + 1).to(tl.int32)
            above, _, _ = _above(
                logits, next_key, next_key, next_key, best, scale, VOCAB, BLOCK, False
            )
            ties = k - above.to(tl.int64)
        if p < 1:
            key = low.to(tl.int32)
            above, all_above, _ = _above(
                logits, (low + 1).to(tl.int32), key, key, best, scale, VOCAB, BLOCK, True
            )
            kept = all_above
            if all_above > above:
                weight = _weights(_value(key, dtype), best, scale)
                kept = tl.minimum(all_above, above + ties.to(tl.float32) * weight)
            cut = _search(logits, p * kept, low, high, best, scale, VOCAB, BLOCK, GALLOP, True)
            next_key = (cut + 1).to(tl.int32)
            above, _, _ = _above(
                logits, next_key, next_key, next_key, best, scale, VOCAB, BLOCK, True
            )
            # Tokens stay while those before them do not reach p.
            weight = _weights(_value(cut.to(tl.int32), dtype), best, scale)
            number = tl.maximum(tl.ceil((p * kept - above) / weight), 1.0)
            number = tl.minimum(number, VOCAB).to(tl.int64)
            ties = tl.where(cut > low, number, tl.minimum(ties, number))
            low = cut
        place = _place(logits, low.to(tl.int32), ties.to(tl.int32), VOCAB, BLOCK)
    tl.store(lowest + row, low.to(tl.int32))
    tl.store(last + row, place)


@triton.jit
def collect_kernel(
    token_ids, logits, lowest, last, NUM: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A program writes one row's tokens within its limits, NUM at most, in the vocabulary's
    order."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    seen = 0
    for start in range(0, VOCAB, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        values = tl.load(logits + row * VOCAB + tokens, mask=tokens < VOCAB, other=float("-inf"))
        kept = _is_kept(values, tokens, lowest, last, row) & (tokens < VOCAB)
        count = tl.sum(kept.to(tl.int32), 0)
        if count > 0:
            places = seen + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(token_ids + row * NUM + places, tokens, mask=kept & (places < NUM))
        seen += count


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
    bests, sums = _blocks(logits, temperature, lowest, last)
    num_blocks = bests.shape[1]
    sample_kernel[(num_rows,)](
        token_ids, logits, temperature, noise_keys, bests, sums, lowest, last, VOCAB=vocab,
        BLOCK=VOCAB_BLOCK, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=8, **pdl_options(logits.device),
    )  # fmt: skip
    return token_ids


def _blocks(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    lowest: torch.Tensor | None = None,
    last: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What sample_blocks_kernel finds, [n, blocks] float32 each."""
    num_rows, vocab = logits.shape
    num_blocks = triton.cdiv(vocab, VOCAB_BLOCK)
    bests, sums = (torch.empty(num_rows, num_blocks, device=logits.device) for _ in range(2))
    sample_blocks_kernel[(num_rows, num_blocks)](
        bests, sums, logits, temperature, lowest, last, VOCAB=vocab, BLOCK=VOCAB_BLOCK,
        num_warps=4, **pdl_options(logits.device),
    )  # fmt: skip
    return bests, sums


def find_limits(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    blocks: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What reference_sampling.keep_likely leaves of each row, without a sort: the most likely
    tokens are those above some logit, which is searched for; of equal ones those that come first.

    Args:
        logits: [n, vocab].
        temperature, top_k, top_p, min_p: [n], as for reference_sampling.sample.

    Returns: the lowest logit that stays, as a key of _keys, and the last token that has it and
    stays: [n] int32 each.
    """
    num_rows, vocab = logits.shape
    bests, _ = blocks or _blocks(logits, temperature)
    lowest, last = torch.empty(2, num_rows, dtype=torch.int32, device=logits.device)
    num_blocks = bests.shape[1]
    limits_kernel[(num_rows,)](
        lowest, last, logits, temperature, top_k, top_p, min_p, bests, VOCAB=vocab,
        BLOCK=SEARCH_BLOCK, NUM_BLOCKS=num_blocks, BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=SEARCH_WARPS, **pdl_options(logits.device),
    )  # fmt: skip
    return lowest, last


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference_sampling.top_logprobs."""
    num_rows, vocab = logits.shape
    ones = torch.ones(num_rows, device=logits.device)
    bests, sums = blocks = _blocks(logits, ones)
    top_ids = torch.zeros(num_rows, num_top, dtype=torch.int64, device=logits.device)
    top_k = torch.full_like(token_ids, num_top)
    lowest, last = find_limits(logits, ones, top_k, ones, torch.zeros_like(ones), blocks)
    collect_kernel[(num_rows,)](
        top_ids, logits, lowest, last, NUM=num_top, VOCAB=vocab, BLOCK=SEARCH_BLOCK,
        num_warps=SEARCH_WARPS, **pdl_options(logits.device),
    )  # fmt: skip
    top, order = logits.gather(1, top_ids).sort(dim=-1, descending=True, stable=True)
    own = logits.gather(1, token_ids[:, None])
    ranks = (logits >= own).sum(-1)
    normalizer = (bests + sums.log()).logsumexp(-1, keepdim=True)
    ids = torch.cat((token_ids[:, None], top_ids.gather(1, order)), 1)
    return ids, torch.cat((own, top), 1).float() - normalizer, ranks
