"""PagedAttention in Triton: attention over the blocks of the KV cache, for decodes and prefill
chunks alike. attention.py launches it.

A work list (work_list.py) drives it: each item is a tile of query rows of one sequence and a range
of its keys. A CTA (Triton's program) computes one item for one KV head. A tile whose keys are
divided among several items (split-KV; Flash-Decoding, Dao et al. 2023) is merged by the CTA that
finishes last. The list is data, so one launch, also in a CUDA graph, serves any lengths. Inside an
item runs FlashAttention's loop (Dao 2023): BLOCK_N keys at a time, with a running maximum and sum.

A batch of decodes can come straight from the QKV projection: each CTA normalises and rotates its
query; the CTA with a sequence's last keys does the same with the new key, attends to it from
registers and stores it.

Keys that several decodes share (shared_prefix.py finds them) have a launch of their own before the
others, with tiles of query rows of many sequences. The next launch, for every sequence's own keys,
runs beside it, and a small kernel merges the results of both.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from nanovllm.ops.triton.work_list import ITEM_WIDTH

# Columns of a work list.
(
    ROW, TOKEN, NUM_TOKENS, POSITION, KEY_START, KEY_END, SLOT, FIRST_SLOT, NUM_PARTS,
    PREFIX_SLOT, PREFIX_TOKEN, PREFIX_TOKENS, PREFIX_PARTS,
) = map(tl.constexpr, range(ITEM_WIDTH))  # fmt: skip
WIDTH = tl.constexpr(ITEM_WIDTH)


@triton.jit
def _pages_of(
    table, first_key, key_end,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The cache block of each of BLOCK_N keys, [N]. If BLOCK_N is a multiple of the cache's block
    size, or divides it, a few scalar loads suffice: a load for each key costs a quarter of the
    speed."""
    entry = table + first_key // BLOCK_SIZE
    if BLOCK_SIZE % BLOCK_N == 0:
        return tl.zeros([BLOCK_N], tl.int32) + tl.load(entry)
    elif BLOCK_SIZE >= 16 and BLOCK_N % BLOCK_SIZE == 0:
        place = tl.arange(0, BLOCK_N) // BLOCK_SIZE
        last = (key_end - 1) // BLOCK_SIZE - first_key // BLOCK_SIZE
        pages = tl.zeros([BLOCK_N], tl.int32) + tl.load(entry)
        for i in tl.static_range(1, BLOCK_N // BLOCK_SIZE):
            page = tl.load(entry + (tl.minimum(i, last) if MASKED else i))
            pages = tl.where(place == i, page, pages)
        return pages
    else:
        keys = first_key + tl.arange(0, BLOCK_N)
        return tl.load(table + keys // BLOCK_SIZE, mask=keys < key_end, other=0)


@triton.jit
def _slots_of(
    table, first_key, key_end, page_stride, slot_stride,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The offset of each of BLOCK_N keys in the cache, [N]."""
    keys = first_key + tl.arange(0, BLOCK_N)
    pages = _pages_of(table, first_key, key_end, BLOCK_SIZE, BLOCK_N, MASKED)
    return pages.to(tl.int64) * page_stride + (keys % BLOCK_SIZE) * slot_stride


@triton.jit
def _load(ptrs, keys_ok, dims_ok, PAD_D: tl.constexpr, MASKED: tl.constexpr):
    """BLOCK_N keys or values. Slots beyond the context are masked: they belong to other sequences,
    and probability 0 times their NaN would be NaN."""
    if MASKED and PAD_D:
        return tl.load(ptrs, mask=keys_ok & dims_ok, other=0.0)
    elif MASKED:
        return tl.load(ptrs, mask=keys_ok, other=0.0)
    elif PAD_D:
        return tl.load(ptrs, mask=dims_ok, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def _attend_block(
    q, m, total, acc, k, v, first_key, key_end, position, k_head, v_head, table, scale_log2,
    page_stride, slot_stride, dims, dims_ok,
    BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, PAD_D: tl.constexpr, PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Attend to BLOCK_N keys. k and v are None, or loaded already. Shapes: q [M, D], m and total
    [M], acc [M, D], position [M], dims [D]."""
    keys = first_key + tl.arange(0, BLOCK_N)
    keys_ok = keys < key_end
    if k is None:
        slots = _slots_of(
            table, first_key, key_end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_N, MASKED
        )
        k = _load(k_head + slots[None, :] + dims[:, None], keys_ok[None, :], dims_ok[:, None],
                  PAD_D, MASKED)  # fmt: skip
    s = tl.dot(q, k, input_precision=PRECISION)  # [M, N]
    if MASKED:
        s = tl.where((keys[None, :] <= position[:, None]) & keys_ok[None, :], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale_log2)
    # A row that has seen no key yet keeps m = -inf; -inf - -inf would be NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * scale_log2 - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, 1)
    if v is None:
        v = _load(v_head + slots[:, None] + dims[None, :], keys_ok[:, None], dims_ok[None, :],
                  PAD_D, MASKED)  # fmt: skip
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return m_new, total, acc


@triton.jit
def _first_row(slot, head, num_tokens, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """The first row of a head's partial result. A tile's result takes a slot for each of its
    tokens, and in these slots the rows of its heads lie one after another."""
    return slot.to(tl.int64) * (NUM_KV_HEADS * GROUP) + head * num_tokens * GROUP


@triton.jit
def _merge(
    m, total, acc, partial, stats, first_part, num_parts, part_stride, rows, row_ok, dims,
    BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Merge the partial results of a tile: a sum weighted by the sums of their softmaxes. AT_ONCE
    parts are loaded without waiting for each other."""
    for first in range(0, num_parts, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            is_part = tl.full(rows.shape, first + i, tl.int32) < num_parts  # the last are none
            ok = row_ok & is_part
            row = first_part + (first + i) * part_stride + rows
            # .cg: past the SM's own cache, which does not see the writes of other SMs.
            m_part = tl.load(stats + row * 2, mask=ok, other=float("-inf"), cache_modifier=".cg")
            total_part = tl.load(stats + row * 2 + 1, mask=ok, other=0.0, cache_modifier=".cg")
            acc_part = tl.load(
                partial + row[:, None] * BLOCK_D + dims[None, :],
                mask=ok[:, None], other=0.0, cache_modifier=".cg",
            )  # fmt: skip
            m_new = tl.maximum(m, m_part)
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            old, new = tl.exp2(m - shift), tl.exp2(m_part - shift)
            total = total * old + total_part * new
            acc = acc * old[:, None] + acc_part * new[:, None]
            m = m_new
    return m, total, acc


@triton.jit
def _rotate(
    heads, weight, other_weight, cos, sin, eps, ok, dims, others,
    HEAD_DIM: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Normalise and rotate heads, [M, D], with the roundings of qk_norm_rope_store.

    Args:
        heads: pointer to the beginning of each head, [M, 1].
        others: the dimension that each dimension is rotated with, [1, D]; other_weight has the
            norm's weights there.
        sin: negative for the first half.
    """
    x_in = tl.load(heads + dims, mask=ok, other=0.0)
    x = x_in.to(tl.float32)
    other = tl.load(heads + others, mask=ok, other=0.0).to(tl.float32)
    if NORM:
        factor = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
        x = (x * factor).to(x_in.dtype).to(tl.float32) * weight
        other = (other * factor).to(x_in.dtype).to(tl.float32) * other_weight
        x, other = x.to(x_in.dtype).to(tl.float32), other.to(x_in.dtype).to(tl.float32)
    return (x * cos + other * sin).to(x_in.dtype)


@triton.jit(do_not_specialize=["table_stride"])
def paged_attention_kernel(
    out, q, k_cache, v_cache, block_tables, items, list_age, shared_tokens,
    slot_mapping, q_weight, k_weight, rope_table, eps,
    partial, stats, arrivals,
    scale_log2, table_stride, page_stride, slot_stride, head_stride,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, HAS_PREFIXES: tl.constexpr,
    PROJECTED: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention by a work list. CTA i computes item i // K for KV head i % K; CTAs beyond the end
    of the list do nothing.

    Args:
        out: [T, H, D]; merge_prefixes_kernel writes the rows of decodes with a shared prefix.
        q: [T, H, D]; PROJECTED: queries, keys and values of decodes from the projection,
            [T, H + 2K, D]; only then slot_mapping (as in ForwardBatch), the norms' weights [D],
            eps and rope_table are read.
        k_cache, v_cache: blocks of the cache, with strides of block (page_stride), slot and head;
            dims are adjacent.
        block_tables: [rows, blocks] int32.
        items: [items, WIDTH] int32; items without query tokens are padding.
        list_age: [1] int32, steps of decodes since the list was made: sequences are this number
            of tokens longer than in the items.
        shared_tokens: None, or the query tokens of decodes with shared keys, [shared tokens] int32;
            then the items' query tokens are indices into this array.
        partial: [slots * H, BLOCK_D] float32, sums of values; _first_row gives the row.
        stats: [slots * H, 2] float32, maximum and sum of the softmax.
        arrivals: [slots, K] int32, zeros before and after the launch.
        scale_log2: softmax scale * log2(e).
        HAS_PREFIXES: the first keys of some decodes are shared: the launch before attends to them
            meanwhile, and merge_prefixes_kernel follows.
    """
    if PDL and shared_tokens is None:
        gdc_launch_dependents()
    unit = tl.program_id(0)
    item = items + (unit // NUM_KV_HEADS) * WIDTH
    num_tokens = tl.load(item + NUM_TOKENS)
    if num_tokens == 0:
        return
    PAD_D: tl.constexpr = BLOCK_D != HEAD_DIM
    rows = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    dims_ok = dims < HEAD_DIM
    head = unit % NUM_KV_HEADS
    token = tl.load(item + TOKEN)
    position = tl.load(item + POSITION)
    key_start = tl.load(item + KEY_START)
    key_end = tl.load(item + KEY_END)
    has_new = key_end > position
    if shared_tokens is None:
        age = tl.load(list_age)
        position += age
        key_end += tl.where(has_new, age, 0)
    slot = tl.load(item + SLOT)
    table = block_tables + tl.load(item + ROW).to(tl.int64) * table_stride
    row_ok = rows < num_tokens * GROUP
    k_head = k_cache + head.to(tl.int64) * head_stride
    v_head = v_cache + head.to(tl.int64) * head_stride

    # Row r is query head r % GROUP of the KV head, at token r // GROUP of the tile.
    tokens = (token + rows // GROUP).to(tl.int64)
    if shared_tokens is not None:
        tokens = tl.load(shared_tokens + tokens, mask=row_ok, other=0).to(tl.int64)
    q_rows = tokens * (NUM_KV_HEADS * GROUP) + head * GROUP + rows % GROUP
    out_offsets = q_rows[:, None] * HEAD_DIM + dims[None, :]  # [M, D]
    q_ok = row_ok[:, None] & dims_ok[None, :]
    if PROJECTED:
        half: tl.constexpr = HEAD_DIM // 2
        others = tl.where(dims < half, dims + half, dims - half)[None, :]
        angles = rope_table + position.to(tl.int64) * HEAD_DIM + dims % half
        cos = tl.load(angles, mask=dims_ok, other=0.0)[None, :]
        sin = tl.load(angles + half, mask=dims_ok, other=0.0)
        sin = tl.where(dims < half, -sin, sin)[None, :]
        ok = dims_ok[None, :]
        w_q = tl.load(q_weight + dims[None, :], mask=ok, other=0.0).to(tl.float32)
        w_q_others = tl.load(q_weight + others, mask=ok, other=0.0).to(tl.float32)
        w_k = tl.load(k_weight + dims[None, :], mask=ok, other=0.0).to(tl.float32)
        w_k_others = tl.load(k_weight + others, mask=ok, other=0.0).to(tl.float32)
        new_slot = tl.load(slot_mapping + token)
        # The new key comes first, from registers, so all other keys are of earlier steps: the first
        # BLOCK_N of them are loaded before the wait.
        key_end = tl.minimum(key_end, position)
        keys_ok = key_start + tl.arange(0, BLOCK_N) < key_end
        slots = _slots_of(
            table, key_start, key_end, page_stride, slot_stride, BLOCK_SIZE, BLOCK_N, True
        )
        k = _load(k_head + slots[None, :] + dims[:, None], keys_ok[None, :], dims_ok[:, None],
                  PAD_D, True)  # fmt: skip
        v = _load(v_head + slots[:, None] + dims[None, :], keys_ok[:, None], dims_ok[None, :],
                  PAD_D, True)  # fmt: skip
    if PDL and not HAS_PREFIXES:
        gdc_wait()  # the loads above read what was written before the step's first kernel
    if PDL and shared_tokens is not None:
        # All that the next launch (every sequence's own keys) reads is written now: it does not
        # need the results of this launch.
        gdc_launch_dependents()

    if PROJECTED:
        projected = q + token.to(tl.int64) * ((GROUP + 2) * NUM_KV_HEADS * HEAD_DIM)
        q_heads = projected + (head * GROUP + rows[:, None]) * HEAD_DIM
        k_head_new = projected + (GROUP * NUM_KV_HEADS + head) * HEAD_DIM
        new_ok = tl.where(has_new, ok, False)
        new_v = tl.load(
            k_head_new + NUM_KV_HEADS * HEAD_DIM + dims[None, :], mask=new_ok, other=0.0
        )  # [1, D]
        q_tile = _rotate(
            q_heads, w_q, w_q_others, cos, sin, eps, q_ok, dims[None, :], others, HEAD_DIM, NORM
        )
        k_heads = k_head_new + tl.zeros([1, 1], tl.int32)
        new_k = _rotate(
            k_heads, w_k, w_k_others, cos, sin, eps, new_ok, dims[None, :], others, HEAD_DIM, NORM
        )
        in_page = new_slot // BLOCK_SIZE * page_stride + new_slot % BLOCK_SIZE * slot_stride
        tl.store(k_head + in_page + dims[None, :], new_k, mask=new_ok & (new_slot >= 0))
        tl.store(v_head + in_page + dims[None, :], new_v, mask=new_ok & (new_slot >= 0))
        new_s = tl.sum(q_tile.to(tl.float32) * new_k.to(tl.float32), 1) * scale_log2
        m = tl.where(has_new, new_s, float("-inf"))
        total = tl.where(has_new, tl.full([BLOCK_M], 1.0, tl.float32), 0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) + new_v.to(tl.float32)
        position -= 1
        m, total, acc = _attend_block(
            q_tile, m, total, acc, k, v, key_start, key_end, position + rows // GROUP, k_head,
            v_head, table, scale_log2, page_stride, slot_stride, dims, dims_ok,
            BLOCK_SIZE, BLOCK_N, PAD_D, PRECISION, True,
        )  # fmt: skip
        key_start += BLOCK_N
    else:
        # .cg: this launch did not wait (HAS_PREFIXES), so the SM's cache may be stale.
        q_tile = tl.load(q + out_offsets, mask=q_ok, other=0.0, cache_modifier=".cg")
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_position = position + rows // GROUP
    # Keys that every row sees, then keys with a mask.
    seen_by_all = tl.maximum(tl.minimum(key_end, position + 1) - key_start, 0)
    whole_end = key_start + seen_by_all // BLOCK_N * BLOCK_N
    for first_key in range(key_start, whole_end, BLOCK_N):
        m, total, acc = _attend_block(
            q_tile, m, total, acc, None, None, first_key, key_end, row_position, k_head, v_head,
            table, scale_log2, page_stride, slot_stride, dims, dims_ok,
            BLOCK_SIZE, BLOCK_N, PAD_D, PRECISION, False,
        )  # fmt: skip
    for first_key in range(whole_end, key_end, BLOCK_N):
        m, total, acc = _attend_block(
            q_tile, m, total, acc, None, None, first_key, key_end, row_position, k_head, v_head,
            table, scale_log2, page_stride, slot_stride, dims, dims_ok,
            BLOCK_SIZE, BLOCK_N, PAD_D, PRECISION, True,
        )  # fmt: skip

    if slot >= 0:
        part_rows = _first_row(slot, head, num_tokens, NUM_KV_HEADS, GROUP) + rows
        tl.store(stats + part_rows * 2, m, mask=row_ok)
        tl.store(stats + part_rows * 2 + 1, total, mask=row_ok)
        tl.store(partial + part_rows[:, None] * BLOCK_D + dims[None, :], acc, mask=row_ok[:, None])
    if shared_tokens is None:
        merges_here = slot >= 0
        if HAS_PREFIXES:
            merges_here &= tl.load(item + PREFIX_PARTS) == 0
        if merges_here:
            first_slot = tl.load(item + FIRST_SLOT)
            num_parts = tl.load(item + NUM_PARTS)
            arrival = arrivals + first_slot * NUM_KV_HEADS + head
            tl.debug_barrier()  # every warp has stored its part before one thread counts arrival
            if tl.atomic_add(arrival, 1, sem="acq_rel") == num_parts - 1:
                m = tl.full([BLOCK_M], float("-inf"), tl.float32)
                total = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
                m, total, acc = _merge(
                    m, total, acc, partial, stats,
                    _first_row(first_slot, head, num_tokens, NUM_KV_HEADS, GROUP), num_parts,
                    num_tokens * (NUM_KV_HEADS * GROUP), rows, row_ok, dims, BLOCK_D,
                    4 if BLOCK_M <= 16 else 1,
                )  # fmt: skip
                tl.store(arrival, 0)
                slot = -1
        if slot < 0:
            tl.store(out + out_offsets, acc / total[:, None], mask=q_ok)
    if PDL and HAS_PREFIXES and unit == 0:
        gdc_wait()  # so that the end of this launch implies the end of the shared keys' launch


@triton.jit
def merge_prefixes_kernel(
    out, items, partial, stats,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merge the results of own and of shared keys. CTA i does so for the decode of item i // K and
    KV head i % K; CTAs of items without a prefix, and of all but a decode's first item, do nothing.
    Arguments as in paged_attention_kernel, in its launch for own keys; BLOCK_M >= GROUP."""
    unit = tl.program_id(0)
    item = items + (unit // NUM_KV_HEADS) * WIDTH
    head = unit % NUM_KV_HEADS
    prefix_parts = tl.load(item + PREFIX_PARTS)
    first_slot = tl.load(item + FIRST_SLOT)
    is_first = tl.load(item + SLOT) == first_slot  # of the decode's items
    prefix_tokens = tl.load(item + PREFIX_TOKENS)
    prefix_row = _first_row(tl.load(item + PREFIX_SLOT), head, prefix_tokens, NUM_KV_HEADS, GROUP)
    prefix_row += tl.load(item + PREFIX_TOKEN) * GROUP
    num_parts = tl.load(item + NUM_PARTS)
    rows = tl.arange(0, BLOCK_M)
    row_ok = rows < GROUP
    dims = tl.arange(0, BLOCK_D)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if (prefix_parts > 0) & is_first:
        num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        m, total, acc = _merge(
            m, total, acc, partial, stats, _first_row(first_slot, head, 1, NUM_KV_HEADS, GROUP),
            num_parts, num_heads, rows, row_ok, dims, BLOCK_D, 2,
        )  # fmt: skip
        m, total, acc = _merge(
            m, total, acc, partial, stats, prefix_row, prefix_parts, prefix_tokens * num_heads,
            rows, row_ok, dims, BLOCK_D, 4,
        )  # fmt: skip
        out_rows = (tl.load(item + TOKEN) * NUM_KV_HEADS + head) * GROUP + rows
        out_values = out + out_rows[:, None] * HEAD_DIM + dims[None, :]
        ok = row_ok[:, None] & (dims < HEAD_DIM)[None, :]
        tl.store(out_values, acc / total[:, None], mask=ok)
