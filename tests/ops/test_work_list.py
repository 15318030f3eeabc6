"""The work list of attention: every key of every query token once, within the bounds that buffers
are sized by."""

import numpy as np
import pytest

from nanovllm.ops.triton.shared_prefix import find_groups, gain_of, max_tiles
from nanovllm.ops.triton.work_list import (
    Prefixes,
    Sizes,
    max_items,
    max_shared_slots,
    max_slots,
    prefixes_of,
    work_list,
)


def random_step(rng):
    num_seqs = int(rng.integers(1, 60))
    query_lens = np.where(rng.random(num_seqs) < 0.6, 1, rng.integers(1, 300, num_seqs))
    longest = int(rng.choice([1, 50, 3000, 100_000]))
    context_lens = query_lens + rng.integers(0, longest, num_seqs)
    query_start = np.concatenate(([0], query_lens.cumsum()))[:-1]
    return rng.permutation(num_seqs + 5)[:num_seqs], query_start, query_lens, context_lens


def random_sizes(rng):
    return Sizes(
        tile_tokens=int(rng.choice([1, 2, 8, 64])),
        num_kv_heads=int(rng.choice([1, 2, 8, 96])),
        num_units=int(rng.choice([1, 7, 132, 792])),
        min_keys=int(rng.choice([16, 128, 256])),
    )


def random_prefixes(rng, context_lens):
    """Some decodes' first keys are others' work; where their results are does not matter here."""
    num_keys = rng.integers(0, context_lens) // 16 * 16 * (rng.random(len(context_lens)) < 0.5)
    return Prefixes(num_keys, *rng.integers(1, 99, (4, len(num_keys))) * (num_keys > 0))


@pytest.mark.parametrize("with_prefixes", [False, True])
@pytest.mark.parametrize("seed", range(200))
def test_every_key_once_within_the_bounds(seed, with_prefixes):
    rng = np.random.default_rng(seed)
    rows, query_start, query_lens, context_lens = random_step(rng)
    prefixes = None
    if with_prefixes:
        query_lens = np.ones_like(query_lens)
        query_start = np.arange(len(query_lens))
        prefixes = random_prefixes(rng, context_lens)
    sizes = random_sizes(rng)
    items = work_list(rows, query_start, query_lens, context_lens, sizes, prefixes=prefixes)
    num_tiles = int((-(-query_lens // sizes.tile_tokens)).sum())
    assert len(items) <= max_items(num_tiles, sizes)
    num_keys = items[:, 5] - items[:, 4]
    assert (np.diff(num_keys) <= 0).all() and (num_keys > 0).all()

    slots = all_slots(items)
    assert slots == list(range(len(slots)))
    num_decodes = len(rows) if with_prefixes else 0
    assert len(slots) <= max_slots(num_decodes, sizes)

    tiles = {}
    for row, token, num_tokens, position, *part, _, _, _, _ in items.tolist():
        tiles.setdefault((row, token, num_tokens, position), []).append(part)
    seen = {}
    for (row, token, num_tokens, position), parts in tiles.items():
        seq = rows.tolist().index(row)
        first = token - query_start[seq]
        assert position == context_lens[seq] - query_lens[seq] + first
        seen.setdefault(seq, []).append((first, first + num_tokens))
        start = prefixes.num_keys[seq] if prefixes else 0
        check_parts(parts, start, position + num_tokens, num_tokens, sizes)
        has_slot = len(parts) > 1 or start > 0
        assert (parts[0][2] >= 0) == has_slot
        if prefixes:
            mine = items[items[:, 0] == row, 9:]
            assert (mine == [a[seq] for a in prefixes[1:]]).all()
        else:
            assert (items[:, 9:] == 0).all()
    for seq, ranges in seen.items():
        ranges.sort()
        assert [r[0] for r in ranges] == [0] + [r[1] for r in ranges[:-1]]
        assert ranges[-1][1] == query_lens[seq]
    assert len(seen) == len(rows)


def check_parts(parts, start, end, num_tokens, sizes):
    """(first key, end, slot, first slot, parts) of a tile's items."""
    parts.sort()
    assert [p[0] for p in parts] == [start] + [p[1] for p in parts[:-1]]
    assert parts[-1][1] == end
    assert all((p[0] - start) % sizes.min_keys == 0 for p in parts)
    assert {p[4] for p in parts} == {len(parts)}
    if parts[0][2] >= 0:
        assert [p[2] - p[3] for p in parts] == [i * num_tokens for i in range(len(parts))]


def all_slots(items):
    return sorted(
        slot + i
        for slot, num_tokens in items[:, [6, 2]].tolist()
        for i in range(num_tokens)
        if slot >= 0
    )


# Shared prefixes


def random_tables(rng, num_seqs):
    """Block tables that form a tree: each begins with some blocks of an earlier one."""
    tables = np.full((num_seqs + 3, 450), 7, np.int32)
    num_pages = np.zeros(num_seqs + 3, np.int64)
    rows = rng.permutation(num_seqs + 3)[:num_seqs]
    next_page = 100
    branches = rng.choice([0.02, 0.1, 0.5])
    for i, row in enumerate(rows):
        shared = 0
        if i and rng.random() > branches:
            other = rows[rng.integers(i)] if rng.random() < 0.2 else rows[0]
            shared = int(num_pages[other] * rng.choice([1, 1, 1, rng.random()]))
            shared = min(shared, 200)
            tables[row, :shared] = tables[other, :shared]
        own = int(rng.integers(1, rng.choice([3, 200])))
        tables[row, shared : shared + own] = np.arange(next_page, next_page + own)
        next_page += own
        num_pages[row] = shared + own
    context_lens = num_pages[rows] * 16 - rng.integers(0, 15, num_seqs)
    return tables, rows, context_lens


@pytest.mark.parametrize("seed", range(200))
def test_groups_share_their_pages_and_are_worth_it(seed):
    rng = np.random.default_rng(seed)
    tables, rows, context_lens = random_tables(rng, int(rng.integers(1, 80)))
    tile_tokens, group = int(rng.choice([1, 2, 8, 64])), int(rng.choice([1, 2, 24]))
    groups = find_groups(
        tables, rows, context_lens, block_size=16, tile_tokens=tile_tokens, group=group
    )
    assert len(set(groups.members.tolist())) == len(groups.members) == groups.sizes.sum()
    gain = num_tiles = 0
    ends = groups.sizes.cumsum()
    for end, size, num_pages in zip(ends, groups.sizes, groups.num_pages, strict=True):
        members = groups.members[end - size : end]
        pages = tables[rows[members], :num_pages]
        assert (pages == pages[0]).all()
        assert (context_lens[members] > num_pages * 16).all()
        mine = gain_of(int(size), int(num_pages) * 16, tile_tokens, group)
        assert mine > 0
        gain += mine
        num_tiles += -(-size // tile_tokens)
    assert gain == groups.gain
    assert num_tiles <= max_tiles(len(rows))
    # No worse than all that begin with the same block as one group, to what they all share.
    simple = 0
    for page in set(tables[rows, 0].tolist()):
        members = np.flatnonzero(tables[rows, 0] == page)
        full = (context_lens[members].min() - 1) // 16
        pages = tables[rows[members], :full]
        num_pages = int((pages == pages[0]).all(0).cumprod().sum())
        simple += max(0, gain_of(len(members), num_pages * 16, tile_tokens, group))
    assert groups.gain >= simple


def test_who_shares_is_found_whatever_the_order():
    """Four questions about each of three documents behind one system prompt: each document is a
    group, not the system prompt; and a lone question about a fourth."""
    rng = np.random.default_rng(0)
    tables = np.zeros((13, 130), np.int32)
    for row in range(13):
        document = row % 3 if row < 12 else 3
        tables[row, :2] = [50, 51]
        tables[row, 2:100] = 1000 * document + np.arange(98) + 100
        tables[row, 100:] = 10_000 + 100 * row + np.arange(30)
    rows = rng.permutation(13)
    groups = find_groups(
        tables, rows, np.full(13, 130 * 16), block_size=16, tile_tokens=64, group=2
    )
    assert groups.sizes.tolist() == [4, 4, 4] and groups.num_pages.tolist() == [100] * 3
    found = rows[groups.members].reshape(3, 4)
    assert sorted(map(sorted, (found % 3).tolist())) == [[0] * 4, [1] * 4, [2] * 4]
    assert 12 not in found


@pytest.mark.parametrize("seed", range(200))
def test_shared_keys_and_own_keys_are_all_keys_once(seed):
    rng = np.random.default_rng(seed)
    tables, rows, context_lens = random_tables(rng, int(rng.integers(3, 80)))
    sizes = random_sizes(rng)
    groups = find_groups(
        tables, rows, context_lens, block_size=16, tile_tokens=sizes.tile_tokens, group=2
    )
    if not len(groups.sizes):
        return
    first_member, shared_from = groups.sizes.cumsum() - groups.sizes, int(rng.integers(0, 99))
    items = work_list(
        rows[groups.members[first_member]], first_member, groups.sizes, groups.num_pages * 16,
        sizes, shared_from=shared_from,
    )  # fmt: skip
    assert len(items) <= max_items(max_tiles(len(rows)), sizes)
    slots = all_slots(items)
    assert slots == list(range(shared_from, shared_from + len(slots)))
    assert len(slots) <= max_shared_slots(len(rows), sizes)

    keys = {}  # of each decode: its parts' keys
    slots = {}
    for row, token, num_tokens, position, *part, _, _, _, _ in items.tolist():
        for place, seq in enumerate(groups.members[token : token + num_tokens]):
            assert (tables[row, : part[1] // 16] == tables[rows[seq], : part[1] // 16]).all()
            assert position >= part[1] - 1
            keys.setdefault(seq, []).append(part)
            slots.setdefault(seq, []).append((part[2], place, num_tokens, part[4]))
    prefixes = prefixes_of(items, groups.members, len(rows))
    for seq, context_len in enumerate(context_lens):
        if seq not in keys:
            assert all(a[seq] == 0 for a in prefixes)
            continue
        num_tokens = slots[seq][0][2]
        assert 0 < prefixes.num_keys[seq] < context_len
        check_parts(keys[seq], 0, prefixes.num_keys[seq], num_tokens, sizes)
        assert {s[1:] for s in slots[seq]} == {tuple(a[seq] for a in prefixes[2:])}
        starts = prefixes.first_slot[seq] + num_tokens * np.arange(prefixes.num_parts[seq])
        assert sorted(s[0] for s in slots[seq]) == starts.tolist()
