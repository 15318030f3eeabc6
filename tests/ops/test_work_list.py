"""The work list of attention: every key of every query token once, within the bounds that buffers
are sized by."""

import numpy as np
import pytest

from nanovllm.ops.work_list import max_items, max_slots, work_list


def random_step(rng):
    num_seqs = int(rng.integers(1, 60))
    query_lens = np.where(rng.random(num_seqs) < 0.6, 1, rng.integers(1, 300, num_seqs))
    longest = int(rng.choice([1, 50, 3000, 100_000]))
    context_lens = query_lens + rng.integers(0, longest, num_seqs)
    query_start = np.concatenate(([0], query_lens.cumsum()))[:-1]
    return rng.permutation(num_seqs + 5)[:num_seqs], query_start, query_lens, context_lens


@pytest.mark.parametrize("seed", range(200))
def test_every_key_once_within_the_bounds(seed):
    rng = np.random.default_rng(seed)
    rows, query_start, query_lens, context_lens = random_step(rng)
    tile_tokens = int(rng.choice([1, 2, 8, 64]))
    num_kv_heads, num_units = int(rng.choice([1, 2, 8, 96])), int(rng.choice([1, 7, 132, 792]))
    min_keys = int(rng.choice([16, 128, 256]))
    items = work_list(
        rows, query_start, query_lens, context_lens, tile_tokens=tile_tokens,
        num_kv_heads=num_kv_heads, num_units=num_units, min_keys=min_keys,
    )  # fmt: skip
    num_tiles = int((-(-query_lens // tile_tokens)).sum())
    assert len(items) <= max_items(num_tiles, num_kv_heads, num_units)
    num_keys = items[:, 5] - items[:, 4]
    assert (np.diff(num_keys) <= 0).all() and (num_keys > 0).all()
    assert (items[:, 4] % min_keys == 0).all()

    slots = items[items[:, 6] >= 0, 6]
    assert sorted(slots) == list(range(len(slots)))
    assert len(slots) <= max_slots(tile_tokens, num_kv_heads, num_units)

    tiles = {}
    for row, token, num_tokens, position, start, end, slot, first_slot, parts in items.tolist():
        tiles.setdefault((row, token, num_tokens, position), []).append(
            (start, end, slot, first_slot, parts)
        )
    seen = {}
    for (row, token, num_tokens, position), parts in tiles.items():
        seq = rows.tolist().index(row)
        first = token - query_start[seq]
        assert position == context_lens[seq] - query_lens[seq] + first
        seen.setdefault(seq, []).append((first, first + num_tokens))
        parts.sort()
        assert [p[0] for p in parts] == [0] + [p[1] for p in parts[:-1]]
        assert parts[-1][1] == position + num_tokens
        assert {p[4] for p in parts} == {len(parts)}
        if len(parts) == 1:
            assert parts[0][2] == -1
        else:
            assert [p[2] - p[3] for p in parts] == list(range(len(parts)))
    for seq, ranges in seen.items():
        ranges.sort()
        assert [r[0] for r in ranges] == [0] + [r[1] for r in ranges[:-1]]
        assert ranges[-1][1] == query_lens[seq]
    assert len(seen) == len(rows)
