"""How many blocks running sequences will hold at their peak, for the scheduler's admissions
(docs/decisions/0010)."""

import numpy as np


def expected_steps(
    num_tokens: np.ndarray,
    num_prompt_tokens: np.ndarray,
    max_len: np.ndarray,
    may_stop: np.ndarray,
    mean_output: int,
) -> np.ndarray:
    """For how many steps sequences will hold their blocks, [n]. Certain for sequences that only
    max_len ends. The others are expected to generate mean_output tokens, and past that an eighth
    more.

    Args:
        num_tokens: [n] in the cache now.
        num_prompt_tokens, max_len: [n] where the sequence's output begins, and where it ends.
        may_stop: [n] whether a stop token may end it before.
    """
    until_stop = np.maximum(num_prompt_tokens + mean_output - num_tokens, mean_output // 8)
    # The last token is never in the cache; in the step in which it might be, it is read.
    until_end = max_len - num_tokens
    return np.where(may_stop, np.minimum(until_stop, until_end), until_end)


def peak_blocks(
    num_tokens: np.ndarray,
    num_steps: np.ndarray,
    num_owned: np.ndarray,
    block_size: int,
    window: int | None = None,
) -> int:
    """The most blocks that sequences own at a time, if each gets a token in every one of its steps,
    and then gives its blocks back. An upper bound: by less than a block each, without a window.

    What they own grows until one of them ends, so the peak is at the end of one: sequences with
    that number of steps or more are still there, and each has got that number of tokens.

    Args:
        num_tokens: [n] in the cache now.
        num_steps: [n] until they end.
        num_owned: [n] of the blocks that hold num_tokens: the blocks that the sequence gives back.
        block_size: tokens per block.
        window: as of a CacheGroup. A sequence gives back the blocks before it when it opens one.
    """
    longest_first = np.argsort(-num_steps)
    num_there = np.arange(1, len(num_steps) + 1)
    new_tokens = num_there * num_steps[longest_first]
    # Each opens a block when its free slots are used up, and for every block_size tokens after.
    free_slots = -num_tokens % block_size
    rounding = (block_size - 1 - free_slots)[longest_first].cumsum()
    owned = num_owned[longest_first].cumsum()
    peak = int((owned + (new_tokens + rounding) // block_size).max())
    if window is None:
        return peak
    # Or, if less, the most that each of them owns, as if all did at the same time.
    new_blocks = -(-(num_tokens + num_steps) // block_size) - -(-num_tokens // block_size)
    in_window = 1 - (1 - window) // block_size
    most = np.maximum(num_owned, np.minimum(num_owned + new_blocks, in_window))
    return min(peak, int(most.sum()))
