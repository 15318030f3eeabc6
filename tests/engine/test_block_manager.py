"""Which blocks are shared, which are reused first, and that only equal contents are ever shared."""

from array import array

import numpy as np
from fake_worker import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.core.step import CacheGroup
from nanovllm.engine.block_manager import BlockManager


def make_manager(num_blocks, block_size, *windows, enable_prefix_caching=True):
    """A group for each window; without any, one that sees all."""
    groups = tuple(CacheGroup(num_blocks, block_size, window) for window in windows or (None,))
    return BlockManager(groups, enable_prefix_caching)


def allocate(manager, seq):
    """Blocks for all its tokens. Returns how many of the tokens were cached."""
    hits = manager.find_prefix(seq)
    manager.allocate(seq, hits)
    return hits.shape[1] * manager.block_size


def compute(manager, tokens):
    """Allocate, compute and register a sequence of these tokens. Returns it and how many of them
    were cached."""
    seq = make_sequence(tokens)
    num_cached = allocate(manager, seq)
    manager.register(seq, len(tokens))
    return seq, num_cached


def fill(manager, *contents):
    """Compute and free one after another."""
    for tokens in contents:
        manager.free(compute(manager, tokens)[0])


def num_cached(manager, tokens):
    """Cached tokens of a prompt, without allocating anything."""
    return manager.find_prefix(make_sequence(tokens)).shape[1] * manager.block_size


def test_the_longest_cached_prefix_is_shared():
    manager = make_manager(16, 2)
    first, _ = compute(manager, [1, 2, 3, 4, 5, 6, 7])
    second, cached = compute(manager, [1, 2, 3, 4, 9, 9, 9])
    assert cached == 4
    assert second.block_tables[0][:2] == first.block_tables[0][:2]
    assert not set(second.block_tables[0][2:]) & set(first.block_tables[0])
    assert [manager.pools[0].ref_counts[block] for block in second.block_tables[0]] == [2, 2, 1, 1]


def test_only_full_blocks_with_the_whole_prefix_before_them_are_shared():
    manager = make_manager(16, 2)
    compute(manager, [1, 2, 3, 4, 5])
    assert num_cached(manager, [1, 2, 3, 4, 5, 6]) == 4  # 5 alone does not fill a block
    assert num_cached(manager, [3, 4]) == 0
    assert num_cached(manager, [1, 9, 3, 4]) == 0


def test_blocks_are_shared_as_far_as_they_are_computed_and_known():
    manager = make_manager(16, 2)
    seq = make_sequence([1, 2, 3, 4, 5, 6])
    allocate(manager, seq)
    for num_computed, expected in ((1, 0), (3, 2), (4, 4), (6, 6)):
        manager.register(seq, num_computed)
        assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == expected
    manager.append([seq], np.array([seq.row]))
    manager.register(seq, 8)  # decodes whose tokens are still on the device
    assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 6
    seq.token_ids.extend([7, 8])
    manager.register(seq, 8)
    assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 8


def test_the_least_recently_used_block_is_reused_first():
    manager = make_manager(3, 2)
    fill(manager, [1, 1], [2, 2], [3, 3], [1, 1])  # 1 is used again
    for tokens, left in ([4, 4], {1, 3}), ([5, 5], {1}), ([6, 6], set()):
        fill(manager, tokens)
        assert {n for n in (1, 2, 3) if num_cached(manager, [n, n])} == left


def test_blocks_without_content_are_reused_before_cached_ones():
    manager = make_manager(4, 2)
    fill(manager, [1, 1])
    partial, _ = compute(manager, [2])
    fill(manager, [3, 3])
    manager.free(partial)
    for tokens in [4], [5, 5], [6]:  # the partial block, the one never used, the partial again
        fill(manager, tokens)
        assert num_cached(manager, [1, 1]) == num_cached(manager, [3, 3]) == 2


def test_the_last_blocks_of_a_sequence_are_reused_before_its_first():
    manager = make_manager(4, 2)
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(manager, long)
    for left in (6, 4, 2, 0):
        compute(manager, [left + 10])
        assert num_cached(manager, long) == left


def test_hits_that_no_sequence_holds_are_free_blocks():
    manager = make_manager(4, 2)
    fill(manager, [1, 2, 3, 4])
    compute(manager, [9])
    free = list(manager.pools[0].free_blocks)
    seq = make_sequence([1, 2, 3, 4, 5])
    hits = manager.find_prefix(seq)  # and finding them changes nothing
    assert (hits.shape, list(manager.pools[0].free_blocks)) == ((1, 2), free)
    assert manager.num_needed(seq, hits) == [3]
    assert allocate(manager, seq) == 4
    assert manager.num_needed(seq, hits) == [1] and manager.num_free == 0


def test_hits_that_others_hold_take_no_free_block():
    manager = make_manager(3, 2)
    compute(manager, [1, 2, 3, 4])
    assert compute(manager, [1, 2, 3, 4, 5])[1] == 4
    assert manager.num_free == 0


def test_a_duplicate_of_a_cached_block_keeps_the_first_holder():
    manager = make_manager(4, 2)
    seqs = [make_sequence([1, 2]) for _ in range(2)]
    for seq in seqs:  # neither is registered when the other is allocated
        allocate(manager, seq)
    for seq in seqs:
        manager.register(seq, 2)
    assert manager.find_prefix(make_sequence([1, 2])).tolist() == [seqs[0].block_tables[0].tolist()]
    for seq in seqs:
        manager.free(seq)
    assert num_cached(manager, [1, 2]) == 2


def test_a_block_that_is_reused_is_no_hit():
    manager = make_manager(4, 2)
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(manager, long)
    assert num_cached(manager, long) == 8
    compute(manager, [8])  # takes the last block
    assert num_cached(manager, long) == 6
    assert compute(manager, [1, 2, 3, 4, 9])[1] == 4  # takes the third
    assert num_cached(manager, long) == 4


def test_a_block_is_a_hit_as_soon_as_it_is_registered():
    manager = make_manager(8, 2)
    seq = make_sequence([1, 2, 3, 4, 5, 6])
    allocate(manager, seq)
    for num_computed in (2, 6):
        manager.register(seq, num_computed)
        assert num_cached(manager, [1, 2, 3, 4, 5, 6]) == num_computed


TEXTS = ([1, 2] * 8, [1] * 16, [1, 2] * 3 + [2] * 10)
CUTS = st.tuples(st.sampled_from(TEXTS), st.integers(1, 16), st.lists(st.integers(1, 2)))
ACTIONS = st.lists(st.tuples(CUTS, st.sampled_from(["compute", "compute", "free"])))
WINDOWS = st.sampled_from([(None,), (None, 3), (6,), (2, None, 5)])


def cached_texts(manager):
    """For each group: all tokens up to the end of a cached block -> the block."""
    contents = {prefix: content for content, prefix in manager.prefixes.items()}
    texts = {0: ()}
    for prefix in sorted(contents):  # the shorter ones are older
        before, tokens = contents[prefix]
        if before in texts:  # else it can't be found any more
            texts[prefix] = (*texts[before], *array("I", tokens))
    return texts.values(), [
        {texts[prefix]: block for prefix, block in pool.cached.items() if prefix in texts}
        for pool in manager.pools
    ]


def first_seen(num_tokens, window, block_size):
    return 0 if window is None else max(0, num_tokens - window) // block_size


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(ACTIONS, st.integers(1, 4), WINDOWS)
def test_a_hit_is_the_longest_whose_last_window_every_group_has(actions, size, windows):
    manager, held = make_manager(24, size, *windows), []
    for (text, length, tail), action in actions:
        tokens = (text[:length] + tail)[:24]
        if action == "free" and held:
            manager.free(held.pop(len(tokens) % len(held)))
        if action == "free" or manager.blocks_for(len(tokens)) > manager.num_free:
            continue
        known, groups = cached_texts(manager)
        expected = []
        for end in range(len(tokens) // size + 1):
            if tuple(tokens[: end * size]) not in known:
                break
            tables = [
                [
                    cached.get(tuple(tokens[: (i + 1) * size])) if i >= first else -1
                    for i in range(end)
                ]
                for cached, window in zip(groups, windows, strict=True)
                for first in [first_seen(end * size, window, size)]
            ]
            if not any(None in table for table in tables):
                expected = tables
        seq = make_sequence(tokens)
        hits = manager.find_prefix(seq)
        assert hits.tolist() == (expected or [[] for _ in windows])
        manager.allocate(seq, hits)
        manager.register(seq, len(tokens))
        manager.free_outside(seq, len(tokens))
        held.append(seq)


def test_without_prefix_caching_nothing_is_shared():
    manager = make_manager(4, 2, enable_prefix_caching=False)
    fill(manager, [1, 2])
    assert compute(manager, [1, 2])[1] == 0


# Windows


def test_blocks_outside_the_window_are_freed_and_can_be_hit():
    manager = make_manager(8, 2, None, 4)
    tokens = list(range(12))
    seq, _ = compute(manager, tokens)
    manager.free_outside(seq, 9)  # sees positions 6 to 9
    assert [len(pool.free_blocks) for pool in manager.pools] == [2, 5]
    assert [block >= 0 for block in seq.block_tables[1]] == [False] * 3 + [True] * 3
    assert num_cached(manager, tokens) == 12
    other, cached = compute(manager, tokens[:4])
    assert cached == 4 and other.block_tables[0] == seq.block_tables[0][:2]
    manager.free(other)
    manager.free(seq)
    assert [len(pool.free_blocks) for pool in manager.pools] == [8, 8]


def test_a_prefix_needs_only_its_last_window():
    manager = make_manager(8, 2, None, 4)
    tokens = list(range(12))
    seq, _ = compute(manager, tokens)
    manager.free_outside(seq, 12)
    large, small = manager.pools
    assert len(large.free_blocks) == 2 and len(small.free_blocks) == 6
    for _ in range(6):  # all that are free are reused
        manager._take(small, np.zeros(1, int))
    assert num_cached(manager, tokens) == 12
    assert num_cached(manager, tokens[:10]) == 0  # whose window began earlier
    hits = manager.find_prefix(make_sequence(tokens))
    assert (hits[0] >= 0).all() and (hits[1] >= 0).tolist() == [False] * 4 + [True] * 2


def test_a_hit_ends_where_one_group_has_no_more():
    manager = make_manager(6, 2, None, None)
    fill(manager, [1, 2, 3, 4, 5, 6])
    for _ in range(4):  # three were never used, then the last of the three
        manager._take(manager.pools[1], np.zeros(1, int))
    assert num_cached(manager, [1, 2, 3, 4, 5, 6]) == 4
