"""The forecast of pages against a count, step by step."""

import numpy as np
import pytest

from nanovllm.engine.forecast import expected_steps, peak_pages


def count_peak(num_tokens, num_steps, num_owned, block_size):
    pages = -(-num_tokens // block_size)
    shared = pages - num_owned
    peak = 0
    for step in range(int(num_steps.max()) + 1):
        there = num_steps >= step
        peak = max(peak, int((-(-(num_tokens + step) // block_size) - shared)[there].sum()))
    return peak


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_the_peak_is_that_of_a_count_or_less_than_a_page_each_above(block_size):
    rng = np.random.default_rng(block_size)
    for num_seqs in (1, 2, 5, 40):
        for longest in (1, 10, 200):
            num_tokens = rng.integers(1, 300, num_seqs)
            num_steps = rng.integers(0, longest, num_seqs)
            num_owned = rng.integers(0, -(-num_tokens // block_size) + 1)
            counted = count_peak(num_tokens, num_steps, num_owned, block_size)
            peak = peak_pages(num_tokens, num_steps, num_owned, block_size)
            most = num_seqs - 1 if block_size > 1 else 0
            assert counted <= peak <= counted + most


def test_sequences_are_expected_to_end_at_max_len_or_about_the_mean():
    num_tokens = np.array([10, 10, 60, 200, 10])
    may_stop = np.array([False, True, True, True, True])
    max_len = np.array([300, 300, 300, 300, 40])
    steps = expected_steps(num_tokens, np.full(5, 10), max_len, may_stop, mean_output=80)
    assert steps.tolist() == [290, 80, 30, 10, 30]
