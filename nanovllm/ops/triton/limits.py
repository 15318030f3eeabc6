"""What top_k, top_p and min_p leave of a row of logits, and the row's most likely tokens, as Triton
kernels: a search, not a sort (docs/decisions/0020).

sampling.py draws within the limits; ops/__init__.py calls top_logprobs.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nanovllm.ops.triton.blocks import (
    Blocks,
    blocks_of,
    is_kept,
    keys_of,
    log2e_over,
    value_of,
    weights_of,
)
from nanovllm.ops.triton.kernel_configs import (
    CANDIDATES,
    SEARCH_BLOCK,
    SEARCH_WARPS,
    next_power_of_2,
)
from nanovllm.ops.triton.layers import pdl_options


@triton.jit
def _above(
    logits, size, a, b, c, best, scale,
    BLOCK: tl.constexpr, MASS: tl.constexpr, STRICT: tl.constexpr = False,
):  # fmt: skip
    """The numbers of logits, of `size`, with keys >= a (with STRICT > a), >= b and >= c; with MASS
    the sums of their softmax weights."""
    a = value_of(a.to(tl.int32), logits.dtype.element_ty)  # comparing values needs no keys
    b = value_of(b.to(tl.int32), logits.dtype.element_ty)
    c = value_of(c.to(tl.int32), logits.dtype.element_ty)
    above_a = tl.zeros((BLOCK,), tl.float32)  # sums of ones are exact up to 2^24
    above_b = tl.zeros((BLOCK,), tl.float32)
    above_c = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(logits + places, mask=places < size, other=float("nan")).to(tl.float32)
        weights = 1.0
        if MASS:
            weights = weights_of(values, best, scale)
        above_a += tl.where(values > a if STRICT else values >= a, weights, 0.0)
        above_b += tl.where(values >= b, weights, 0.0)
        above_c += tl.where(values >= c, weights, 0.0)
    return tl.sum(above_a, 0), tl.sum(above_b, 0), tl.sum(above_c, 0)


@triton.jit
def _search(
    logits, size, target, low, high, best, scale,
    BLOCK: tl.constexpr, GALLOP: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """The highest key from `low` to `high` at or above which lie `target` logits, or logits of this
    weight; `low` if fewer do. Each turn reads the logits once and leaves a quarter of the keys; the
    first one looks close to the best, where most limits are."""
    a = tl.maximum(high - 15 * GALLOP, low + 1)
    b = tl.maximum(high - 255 * GALLOP, low + 1)
    c = tl.maximum(high - 4095 * GALLOP, low + 1)
    while low < high:
        above_a, above_b, above_c = _above(logits, size, a, b, c, best, scale, BLOCK, MASS)
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
    # On a device that flushes tiny values to 0, comparisons of values do so too.
    dtype: tl.constexpr = logits.dtype.element_ty
    return keys_of(value_of(low.to(tl.int32), dtype).to(dtype)).to(tl.int64)


@triton.jit
def _choose_groups(
    chosen, group_bests, border, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr
):  # fmt: skip
    """Write down, in order, the groups with a logit >= `border`; returns their number."""
    groups = tl.arange(0, GROUPS)
    best = tl.load(group_bests + groups, mask=groups < NUM_GROUPS, other=float("nan"))
    is_in = (best.to(tl.float32) >= border).to(tl.int32)
    tl.debug_barrier()  # all threads have read the former choice
    tl.store(chosen + tl.cumsum(is_in, 0) - 1, groups, mask=is_in > 0)
    tl.debug_barrier()  # the stores of other threads are read next
    return tl.sum(is_in, 0)


@triton.jit
def _tokens_of(
    chosen, num_chosen, start, VOCAB: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr
):
    """BLOCK tokens of the chosen groups, from `start` on; VOCAB or more stands for no token."""
    places = start + tl.arange(0, BLOCK)
    groups = tl.load(chosen + places // GROUP, mask=places < num_chosen * GROUP, other=VOCAB)
    return groups * GROUP + places % GROUP


@triton.jit
def _gather(
    out, out_ids, logits, chosen, num_chosen, border,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """Write down, in the vocabulary's order, logits >= `border` and their tokens; returns their
    number, or some number above ROOM."""
    filled = 0
    for start in range(0, num_chosen * GROUP, BLOCK):
        if filled <= ROOM:
            tokens = _tokens_of(chosen, num_chosen, start, VOCAB, BLOCK, GROUP)
            values = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("nan"))
            is_in = (values.to(tl.float32) >= border).to(tl.int32)
            slots = filled + tl.cumsum(is_in, 0) - 1
            tl.store(out + slots, values, mask=(is_in > 0) & (slots < ROOM))
            tl.store(out_ids + slots, tokens, mask=(is_in > 0) & (slots < ROOM))
            filled += tl.sum(is_in, 0)
    tl.debug_barrier()  # what other threads have stored is read next
    return filled


@triton.jit
def _place(logits, size, key, number, BLOCK: tl.constexpr):
    """The place of the logit that is number `number` with this key; `size` if fewer have it."""
    value = value_of(key, logits.dtype.element_ty)
    place, seen = size, 0
    for start in range(0, size, BLOCK):
        if seen < number:
            places = start + tl.arange(0, BLOCK)
            values = tl.load(logits + places, mask=places < size, other=float("nan"))
            is_equal = (values.to(tl.float32) == value).to(tl.int32)
            count = tl.sum(is_equal, 0)
            if seen + count >= number:
                is_it = (is_equal > 0) & (seen + tl.cumsum(is_equal, 0) == number)
                place = tl.min(tl.where(is_it, places, size), 0)
            seen += count
    return place


@triton.jit
def _limits_among(
    logits, size, k, p, rest, low, high, best, scale,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, GALLOP: tl.constexpr,
):  # fmt: skip
    """Apply top_k and top_p to logits that include all tokens that may stay, with keys from `low`
    to `high`; the logits left out have the weight `rest`. Returns the lowest key, and the place of
    the last logit with that key that stays; `size`: all of them stay."""
    dtype: tl.constexpr = logits.dtype.element_ty
    ties = tl.full((), VOCAB, tl.float32)
    equal = tl.full((), 0.0, tl.float32)  # number of logits with the lowest key, if not all stay
    if k < VOCAB:
        target = k.to(tl.float32)
        low = _search(logits, size, target, low, high, best, scale, BLOCK, GALLOP, False)
        above, all_above, _ = _above(
            logits, size, low, low, low, best, scale, BLOCK, False, STRICT=True
        )
        ties, equal = target - above, all_above - above
    if p < 1:
        above, all_above, _ = _above(
            logits, size, low, low, low, best, scale, BLOCK, True, STRICT=True
        )
        kept = all_above + rest
        if ties < equal:
            kept = above + ties * weights_of(value_of(low.to(tl.int32), dtype), best, scale)
        target = p * kept
        cut = _search(logits, size, target, low, high, best, scale, BLOCK, GALLOP, True)
        above, all_above, _ = _above(
            logits, size, cut, cut, cut, best, scale, BLOCK, True, STRICT=True
        )
        # A token stays if the more likely tokens do not reach p.
        weight = weights_of(value_of(cut.to(tl.int32), dtype), best, scale)
        number = tl.maximum(tl.ceil((target - above) / weight), 1.0)
        if cut > low:
            ties, equal = number, tl.ceil((all_above - above) / weight)
        elif number < ties:
            ties, equal = number, tl.maximum(equal, number + 1)
        low = cut
    place = size
    if ties < equal:
        place = _place(logits, size, low.to(tl.int32), ties.to(tl.int32), BLOCK)
    return low, place


@triton.jit
def limits_kernel(
    lowest, last, logits, temperature, top_k, top_p, min_p, bests, sums, group_bests,
    chosen, few, few_ids,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, ROOM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Each CTA finds the limits of one row, as find_limits describes. The last three tensors are
    memory for each row: the groups that are read, and the logits and tokens found there."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(temperature + row)
    scale = log2e_over(t)
    k, p, least = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    logits += row * VOCAB
    dtype: tl.constexpr = logits.dtype.element_ty
    GALLOP: tl.constexpr = 65536 if dtype == tl.float32 else 1
    low = keys_of(tl.full((), float("-inf"), dtype)).to(tl.int64)
    place = VOCAB
    if (t > 0) & ((k < VOCAB) | (p < 1) | (least > 0)):
        blocks = tl.arange(0, BLOCKS)
        there = blocks < NUM_BLOCKS
        block_bests = tl.load(bests + row * NUM_BLOCKS + blocks, mask=there, other=float("-inf"))
        best = tl.max(block_bests, 0)
        high = keys_of(best.to(dtype)).to(tl.int64)
        if least > 0:
            border = best + tl.log2(least) / scale
            low = keys_of(border.to(dtype)).to(tl.int64)
            low += (value_of(low.to(tl.int32), dtype) < border).to(tl.int64)
            low = tl.minimum(low, high)
        if (k < VOCAB) | (p < 1):
            # The best logits of k groups are logits of k tokens, so no token below them stays.
            group_bests += row * NUM_GROUPS
            chosen += row * NUM_GROUPS
            few += row * ROOM
            few_ids += row * ROOM
            target = tl.where(k < VOCAB, k, ROOM // 8).to(tl.float32)
            bound = _search(
                group_bests, NUM_GROUPS, target, low, high, best, scale, GROUPS, GALLOP, False
            )
            border = value_of(bound.to(tl.int32), dtype)
            num_chosen = _choose_groups(chosen, group_bests, border, NUM_GROUPS, GROUPS)
            size = _gather(
                few, few_ids, logits, chosen, num_chosen, border, VOCAB, BLOCK, GROUP, ROOM
            )
            enough = size <= ROOM
            rest = 0.0
            if enough & (k >= VOCAB) & (bound > low):
                # top_p alone: these logits suffice if they reach p; the others count as `rest`.
                sums_ = tl.load(sums + row * NUM_BLOCKS + blocks, mask=there, other=0.0)
                total = tl.sum(sums_ * weights_of(block_bests, best, scale), 0)
                mass, _, _ = _above(few, size, bound, bound, bound, best, scale, BLOCK, True)
                rest = tl.maximum(total - mass, 0.0)
                enough = (least <= 0) & (mass >= p * total)
            if enough:
                low, place = _limits_among(
                    few, size, k, p, rest, bound, high, best, scale, VOCAB, BLOCK, GALLOP
                )
                place = tl.load(few_ids + place, mask=place < size, other=VOCAB)
            else:
                low, place = _limits_among(
                    logits, VOCAB, k, p, 0.0, low, high, best, scale, VOCAB, BLOCK, GALLOP
                )
    tl.store(lowest + row, low.to(tl.int32))
    tl.store(last + row, place)


@triton.jit
def collect_kernel(
    ids, logprobs, ranks, logits, token_ids, lowest, last, bests, sums, group_bests,
    chosen, few, few_ids,
    NUM: tl.constexpr, SLOTS: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    NUM_BLOCKS: tl.constexpr, BLOCKS: tl.constexpr,
    GROUP: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Each CTA writes one row's given token and its NUM most likely tokens in descending order,
    with their log-probabilities, and the rank of the given token. The last three tensors are memory
    for each row."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    group_bests += row * NUM_GROUPS
    chosen += row * NUM_GROUPS
    few += row * SLOTS
    few_ids += row * SLOTS
    blocks = tl.arange(0, BLOCKS)
    there = blocks < NUM_BLOCKS
    block_bests = tl.load(bests + row * NUM_BLOCKS + blocks, mask=there, other=float("-inf"))
    best = tl.max(block_bests, 0)
    total = tl.load(sums + row * NUM_BLOCKS + blocks, mask=there, other=0.0)
    normalizer = best + tl.log(tl.sum(total * weights_of(block_bests, best, 1.4426950408889634), 0))

    border = value_of(tl.load(lowest + row), logits.dtype.element_ty)
    num_chosen = _choose_groups(chosen, group_bests, border, NUM_GROUPS, GROUPS)
    filled = 0
    for start in range(0, num_chosen * GROUP, BLOCK):
        tokens = _tokens_of(chosen, num_chosen, start, VOCAB, BLOCK, GROUP)
        values = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("nan"))
        is_number = values == values  # NaN has no place in an order
        kept = (is_kept(values, tokens, lowest, last, row) & is_number).to(tl.int32)
        slots = filled + tl.cumsum(kept, 0) - 1
        tl.store(few + slots, values, mask=(kept > 0) & (slots < NUM))
        tl.store(few_ids + slots, tokens, mask=(kept > 0) & (slots < NUM))
        filled += tl.sum(kept, 0)
    tl.debug_barrier()  # the stores of other threads are read next

    slots = tl.arange(0, SLOTS)
    found = slots < tl.minimum(filled, NUM)
    top = tl.load(few + slots, mask=found, other=float("-inf")).to(tl.float32)
    top_ids = tl.load(few_ids + slots, mask=found, other=0)
    is_before = (top[None, :] > top[:, None]) | (
        (top[None, :] == top[:, None]) & (slots[None, :] < slots[:, None])
    )
    places = tl.sum(is_before.to(tl.int32), 1)
    line = row * (1 + NUM)
    tl.store(ids + line + 1 + places, top_ids.to(tl.int64), mask=places < NUM)
    tl.store(logprobs + line + 1 + places, top - normalizer, mask=places < NUM)

    token = tl.load(token_ids + row)
    own = tl.load(logits + token).to(tl.float32)
    tl.store(ids + line, token)
    tl.store(logprobs + line, own - normalizer)
    num_chosen = _choose_groups(chosen, group_bests, own, NUM_GROUPS, GROUPS)
    as_likely = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_chosen * GROUP, BLOCK):
        tokens = _tokens_of(chosen, num_chosen, start, VOCAB, BLOCK, GROUP)
        values = tl.load(logits + tokens, mask=tokens < VOCAB, other=float("nan"))
        as_likely += (values.to(tl.float32) >= own).to(tl.int32)
    tl.store(ranks + row, tl.sum(as_likely, 0).to(tl.int64))


def find_limits(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    blocks: Blocks | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What reference_sampling.keep_likely leaves of each row, without a sort: all tokens above some
    logit, which is searched for, and the first tokens that have just that logit.

    Args:
        logits: [n, vocab].
        temperature, top_k, top_p, min_p: [n], as for reference_sampling.sample.
        blocks: blocks_of the logits at that temperature, with groups.

    Returns: the lowest logit that stays, as a key of keys_of, and the last token that has it and
    stays: [n] int32 each.
    """
    num_rows, vocab = logits.shape
    blocks = blocks or blocks_of(logits, temperature, with_groups=True)
    assert blocks.group_bests is not None
    # Not parts of one tensor: kernels would be compiled once more for unaligned parts.
    lowest, last = (
        torch.empty(num_rows, dtype=torch.int32, device=logits.device) for _ in range(2)
    )
    limits_kernel[(num_rows,)](
        lowest, last, logits, temperature, top_k, top_p, min_p, blocks.bests, blocks.sums,
        blocks.group_bests, *_room(blocks.group_bests, CANDIDATES), VOCAB=vocab,
        BLOCK=SEARCH_BLOCK, ROOM=CANDIDATES, num_warps=SEARCH_WARPS, **blocks.sizes,
        **pdl_options(logits.device),
    )  # fmt: skip
    return lowest, last


def _room(group_bests: torch.Tensor, size: int) -> tuple[torch.Tensor, ...]:
    """Room for the groups that a row's program chooses, and for `size` logits and tokens."""
    num_rows = len(group_bests)
    chosen = torch.empty_like(group_bests, dtype=torch.int32)
    few = group_bests.new_empty(num_rows, size)
    return chosen, few, torch.empty_like(few, dtype=torch.int32)


def top_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As reference_sampling.top_logprobs."""
    num_rows, vocab = logits.shape
    ones = torch.ones(num_rows, device=logits.device)
    blocks = blocks_of(logits, ones, with_groups=True)
    assert blocks.group_bests is not None
    top_k = torch.full_like(token_ids, num_top)
    lowest, last = find_limits(logits, ones, top_k, ones, torch.zeros_like(ones), blocks)
    ids = torch.empty(num_rows, 1 + num_top, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(ids.shape, device=logits.device)
    ranks = torch.empty_like(token_ids)
    slots = max(2, next_power_of_2(num_top))
    collect_kernel[(num_rows,)](
        ids, logprobs, ranks, logits, token_ids, lowest, last, blocks.bests, blocks.sums,
        blocks.group_bests, *_room(blocks.group_bests, slots), NUM=num_top, SLOTS=slots,
        VOCAB=vocab, BLOCK=SEARCH_BLOCK, num_warps=SEARCH_WARPS, **blocks.sizes,
        **pdl_options(logits.device),
    )  # fmt: skip
    return ids, logprobs, ranks
