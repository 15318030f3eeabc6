"""Which pages are shared, which are reused first, and that only equal contents are ever shared."""

from array import array

import pytest
from fake_worker import make_sequence
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockManager

NO_LOOKUP = BlockManager(1, 1).last_lookup


def allocate(manager, seq):
    """Pages for all its tokens. Returns how many of the tokens were cached."""
    hits = manager.find_prefix(seq)
    manager.allocate(seq, hits)
    return len(hits) * manager.block_size


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
    return len(manager.find_prefix(make_sequence(tokens))) * manager.block_size


def test_the_longest_cached_prefix_is_shared():
    manager = BlockManager(num_blocks=16, block_size=2)
    first, _ = compute(manager, [1, 2, 3, 4, 5, 6, 7])
    second, cached = compute(manager, [1, 2, 3, 4, 9, 9, 9])
    assert cached == 4
    assert second.block_table[:2] == first.block_table[:2]
    assert not set(second.block_table[2:]) & set(first.block_table)
    assert [manager.ref_counts[page] for page in second.block_table] == [2, 2, 1, 1]


def test_only_full_pages_with_the_whole_prefix_before_them_are_shared():
    manager = BlockManager(num_blocks=16, block_size=2)
    compute(manager, [1, 2, 3, 4, 5])
    assert num_cached(manager, [1, 2, 3, 4, 5, 6]) == 4  # 5 alone does not fill a page
    assert num_cached(manager, [3, 4]) == 0
    assert num_cached(manager, [1, 9, 3, 4]) == 0


def test_pages_are_shared_as_far_as_they_are_computed_and_known():
    manager = BlockManager(num_blocks=16, block_size=2)
    seq = make_sequence([1, 2, 3, 4, 5, 6])
    allocate(manager, seq)
    for num_computed, expected in ((1, 0), (3, 2), (4, 4), (6, 6)):
        manager.register(seq, num_computed)
        assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == expected
    manager.append(seq)
    manager.register(seq, 8)  # decodes whose tokens are still on the device
    assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 6
    seq.token_ids.extend([7, 8])
    manager.register(seq, 8)
    assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7, 8]) == 8


def test_the_least_recently_used_page_is_reused_first():
    manager = BlockManager(num_blocks=3, block_size=2)
    fill(manager, [1, 1], [2, 2], [3, 3], [1, 1])  # 1 is used again
    for tokens, left in ([4, 4], {1, 3}), ([5, 5], {1}), ([6, 6], set()):
        fill(manager, tokens)
        assert {n for n in (1, 2, 3) if num_cached(manager, [n, n])} == left


def test_pages_without_content_are_reused_before_cached_ones():
    manager = BlockManager(num_blocks=4, block_size=2)
    fill(manager, [1, 1])
    partial, _ = compute(manager, [2])
    fill(manager, [3, 3])
    manager.free(partial)
    for tokens in [4], [5, 5], [6]:  # the partial page, the one never used, the partial again
        fill(manager, tokens)
        assert num_cached(manager, [1, 1]) == num_cached(manager, [3, 3]) == 2


def test_the_last_pages_of_a_sequence_are_reused_before_its_first():
    manager = BlockManager(num_blocks=4, block_size=2)
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(manager, long)
    for left in (6, 4, 2, 0):
        compute(manager, [left + 10])
        assert num_cached(manager, long) == left


def test_hits_that_nobody_holds_are_free_pages():
    manager = BlockManager(num_blocks=4, block_size=2)
    fill(manager, [1, 2, 3, 4])
    compute(manager, [9])
    free = list(manager.free_blocks)
    seq = make_sequence([1, 2, 3, 4, 5])
    hits = manager.find_prefix(seq)  # and finding them changes nothing
    assert (len(hits), manager.holders(hits)[0], list(manager.free_blocks)) == (2, 0, free)
    assert allocate(manager, seq) == 4
    assert (manager.holders(hits)[0], manager.num_free) == (2, 0)


def test_hits_that_others_hold_take_no_free_page():
    manager = BlockManager(num_blocks=3, block_size=2)
    compute(manager, [1, 2, 3, 4])
    assert compute(manager, [1, 2, 3, 4, 5])[1] == 4
    assert manager.num_free == 0


def test_a_duplicate_of_a_cached_page_keeps_the_first_holder():
    manager = BlockManager(num_blocks=4, block_size=2)
    seqs = [make_sequence([1, 2]) for _ in range(2)]
    for seq in seqs:  # neither is registered when the other is allocated
        allocate(manager, seq)
    for seq in seqs:
        manager.register(seq, 2)
    assert manager.find_prefix(make_sequence([1, 2])) == seqs[0].block_table
    for seq in seqs:
        manager.free(seq)
    assert num_cached(manager, [1, 2]) == 2


def hashed_pages(monkeypatch):
    """The tokens of the pages that are hashed from now on."""
    pages, real_hash = [], block_manager.xxh3_64_intdigest

    def note(data, seed):
        pages.append(array("I", data).tolist())
        return real_hash(data, seed)

    monkeypatch.setattr(block_manager, "xxh3_64_intdigest", note)
    return pages


@pytest.mark.parametrize(
    ("tokens", "cached", "hashed"),
    [
        ([1, 2, 3, 4, 5, 6, 7], 6, []),  # the same again
        ([1, 2, 3, 4, 5, 6, 8, 9, 9, 9], 6, [[8, 9]]),  # the rest only as far as it is cached
        ([1, 2, 3, 4, 9, 6, 7], 4, [[9, 6]]),
        ([1, 2, 3, 9], 2, [[3, 9]]),  # differs within a page
        ([1, 2, 3, 4, 5], 4, []),  # ends within a page
        ([1, 2, 3, 4], 4, []),  # ends with one
        ([9, 2, 3, 4], 0, [[9, 2]]),
        ([1], 0, []),
    ],
)
def test_what_begins_like_the_sequence_before_is_not_looked_up_again(
    monkeypatch, tokens, cached, hashed
):
    manager = BlockManager(num_blocks=16, block_size=2)
    compute(manager, [1, 2, 3, 4, 5, 6, 7])
    assert num_cached(manager, [1, 2, 3, 4, 5, 6, 7]) == 6
    pages = hashed_pages(monkeypatch)
    assert (num_cached(manager, tokens), pages) == (cached, hashed)


def test_a_page_that_is_gone_since_the_lookup_before_is_no_hit():
    manager = BlockManager(num_blocks=4, block_size=2)
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    fill(manager, long)
    assert num_cached(manager, long) == 8
    manager.append(make_sequence([]))  # takes the last page
    assert num_cached(manager, long) == 6
    assert compute(manager, [1, 2, 3, 4, 9])[1] == 4  # takes the third
    assert num_cached(manager, long) == 4


def test_a_page_that_came_since_the_lookup_before_is_a_hit():
    manager = BlockManager(num_blocks=8, block_size=2)
    seq = make_sequence([1, 2, 3, 4, 5, 6])
    allocate(manager, seq)
    for num_computed in (2, 6):
        manager.register(seq, num_computed)
        assert num_cached(manager, [1, 2, 3, 4, 5, 6]) == num_computed


TEXTS = ([1, 2] * 8, [1] * 16, [1, 2] * 3 + [2] * 10)
CUTS = st.tuples(st.sampled_from(TEXTS), st.integers(1, 16), st.lists(st.integers(1, 2)))
ACTIONS = st.lists(st.tuples(CUTS, st.sampled_from(["look", "compute", "compute", "free"])))


@settings(max_examples=500, derandomize=True, database=None, deadline=None)
@given(ACTIONS, st.integers(1, 4), st.sampled_from([0, 1, 2, 64]))
def test_lookups_find_the_same_without_the_one_before(actions, block_size, hash_bits):
    manager = BlockManager(num_blocks=24, block_size=block_size)
    real_hash, held = block_manager.xxh3_64_intdigest, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            block_manager,
            "xxh3_64_intdigest",
            lambda data, seed: real_hash(data, seed) % 2**hash_bits,
        )
        for (text, length, tail), action in actions:
            tokens = (text[:length] + tail)[:24]
            found = manager.find_prefix(make_sequence(tokens))
            last, manager.last_lookup = manager.last_lookup, NO_LOOKUP
            assert manager.find_prefix(make_sequence(tokens)) == found
            manager.last_lookup = last
            if action == "compute" and manager.num_pages(len(tokens)) <= manager.num_free:
                held.append(compute(manager, tokens)[0])
            elif action == "free" and held:
                manager.free(held.pop(len(tokens) % len(held)))


def test_without_prefix_caching_nothing_is_shared():
    manager = BlockManager(num_blocks=4, block_size=2, enable_prefix_caching=False)
    fill(manager, [1, 2])
    assert compute(manager, [1, 2])[1] == 0


@pytest.fixture
def collide(monkeypatch):
    """All hashes become this one."""
    return lambda value: monkeypatch.setattr(
        block_manager, "xxh3_64_intdigest", lambda data, seed: value
    )


def test_equal_hashes_of_different_contents_are_no_hit(collide):
    collide(7)
    manager = BlockManager(num_blocks=8, block_size=2)
    compute(manager, [1, 2])
    assert num_cached(manager, [3, 4]) == 0
    compute(manager, [3, 4])  # the newest content stays
    assert num_cached(manager, [1, 2]) == 0
    assert num_cached(manager, [3, 4, 1, 2]) == 2


def test_a_second_page_is_never_taken_for_a_first(collide):
    collide(0)
    manager = BlockManager(num_blocks=8, block_size=2)
    compute(manager, [1, 2])
    assert num_cached(manager, [1, 2, 1, 2]) == 2


def test_a_collision_with_an_evicted_parent_is_no_hit(monkeypatch):
    real_hash = block_manager.xxh3_64_intdigest
    twins = {page_bytes(tokens) for tokens in ([1, 2], [3, 4])}
    monkeypatch.setattr(
        block_manager,
        "xxh3_64_intdigest",
        lambda data, seed: 7 if data in twins else real_hash(data, seed),
    )
    manager = BlockManager(num_blocks=5, block_size=2)
    parent, child = make_sequence([1, 2]), make_sequence([1, 2, 9, 9])
    for seq in (parent, child):  # the child has a duplicate of the parent's page
        allocate(manager, seq)
    for seq in (parent, child):
        manager.register(seq, len(seq.token_ids))
    manager.free(parent)
    others, _ = compute(manager, [5, 5, 6, 6, 8, 8])  # evicts the parent's page
    manager.free(others)
    compute(manager, [3, 4])
    assert num_cached(manager, [3, 4, 9, 9]) == 2


def page_bytes(tokens):
    return make_sequence(tokens).token_ids.tobytes()
