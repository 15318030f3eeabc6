"""The forecast of blocks against a count, step by step."""

import numpy as np
import pytest

from nanovllm.engine.forecast import expected_steps, peak_blocks


def count_peak(num_tokens, num_steps, num_owned, block_size):
    blocks = -(-num_tokens // block_size)
    shared = blocks - num_owned
    peak = 0
    for step in range(int(num_steps.max()) + 1):
        there = num_steps >= step
        peak = max(peak, int((-(-(num_tokens + step) // block_size) - shared)[there].sum()))
    return peak


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_the_peak_is_that_of_a_count_or_less_than_a_block_each_above(block_size):
    rng = np.random.default_rng(block_size)
    for num_seqs in (1, 2, 5, 40):
        for longest in (1, 10, 200):
            num_tokens = rng.integers(1, 300, num_seqs)
            num_steps = rng.integers(0, longest, num_seqs)
            num_owned = rng.integers(0, -(-num_tokens // block_size) + 1)
            counted = count_peak(num_tokens, num_steps, num_owned, block_size)
            peak = peak_blocks(num_tokens, num_steps, num_owned, block_size)
            most = num_seqs - 1 if block_size > 1 else 0
            assert counted <= peak <= counted + most


def test_sequences_are_expected_to_end_at_max_len_or_about_the_mean():
    num_tokens = np.array([10, 10, 60, 200, 10])
    may_stop = np.array([False, True, True, True, True])
    max_len = np.array([300, 300, 300, 300, 40])
    steps = expected_steps(num_tokens, np.full(5, 10), max_len, may_stop, mean_output=80)
    assert steps.tolist() == [290, 80, 30, 10, 30]


def count_peak_in_window(num_tokens, num_steps, num_owned, block_size, window):
    """Sequences that free what is outside of the window when they open a block."""
    peak = 0
    owned, computed = num_owned.copy(), num_tokens.copy()
    for step in range(int(num_steps.max()) + 1):
        there = num_steps >= step
        peak = max(peak, int(owned[there].sum()))
        opens = computed % block_size == 0
        in_window = computed // block_size - np.maximum(computed - window + 1, 0) // block_size
        owned = np.where(opens, np.minimum(owned, in_window) + 1, owned)
        computed += 1
    return peak


@pytest.mark.parametrize("window", [2, 7, 40])
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_the_peak_in_a_window_is_no_less_than_a_count(block_size, window):
    rng = np.random.default_rng(block_size)
    for num_seqs in (1, 2, 5, 40):
        for longest in (1, 10, 200):
            num_tokens = rng.integers(1, 300, num_seqs)
            num_steps = rng.integers(0, longest, num_seqs)
            num_owned = rng.integers(0, -(-num_tokens // block_size) + 1)
            sizes = num_tokens, num_steps, num_owned, block_size
            peak = peak_blocks(*sizes, window)
            assert count_peak_in_window(*sizes, window) <= peak <= peak_blocks(*sizes)
            most = np.maximum(num_owned, -(-(window - 1) // block_size) + 1)
            assert peak <= most.sum()
