"""Find decodes whose block tables begin with the same blocks (a system prompt, samples of one
prompt): the keys that they share are read once a step. attention.py calls it.

Source: Hydragen (Juravsky et al. 2024); FlashInfer's cascade attention (Ye et al. 2025). One level
of sharing is used: every decode is in one set at most. (Sets of decodes are called groups here;
they have nothing to do with groups of layers.)
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

CHUNK = 128  # blocks that are compared at a time


class Groups(NamedTuple):
    """Groups of decodes.

    Attributes:
        members: [members of all groups] indices of decodes, group after group.
        sizes: [groups] members of each group.
        num_pages: [groups] blocks that all members of the group begin with.
        gain: keys that all groups together need not read, by gain_of.
    """

    members: np.ndarray
    sizes: np.ndarray
    num_pages: np.ndarray
    gain: int


NO_GROUPS = Groups(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), 0)


def gain_of(size: int, num_keys: int, tile_tokens: int, group: int) -> int:
    """The keys that a KV head need not read with `size` decodes as a group: the shared keys of each
    decode, less each tile's reading of them. A tile computes for all of its rows, used or not, so
    its reading counts twice. A partial result is written and read in float32, as much as 2 times
    `group` keys of 16 bits; each decode has about three, one of them for its own keys."""
    num_tiles = -(-size // tile_tokens)
    return (size - 2 * num_tiles) * num_keys - 6 * group * size


def max_tiles(num_decodes: int) -> int:
    """Upper bound of the tiles: gain_of is positive only for more than two decodes a tile."""
    return num_decodes // 2


def find_groups(
    block_tables: np.ndarray,
    rows: np.ndarray,
    context_lens: np.ndarray,
    *,
    block_size: int,
    tile_tokens: int,
    group: int,
) -> Groups:
    """The groups with the largest gain. Every member has keys of its own after the shared keys.

    Args:
        block_tables: [rows, blocks].
        rows, context_lens: [decodes] row and number of keys of each decode.
        block_size: tokens in a block.
        tile_tokens: decodes in a tile.
        group: query heads that share a KV head.
    """
    first_page = block_tables[rows, 0]
    order = np.argsort(first_page, kind="stable")
    alike = np.concatenate(([False], np.diff(first_page[order]) == 0, [False]))
    if not (alike[1:] & alike[:-1]).any():
        return NO_GROUPS  # no three block tables begin with the same block
    sharers = order[alike[1:] | alike[:-1]]
    num_pages = (context_lens[sharers] - 1) // block_size
    if not num_pages.any():
        return NO_GROUPS
    # Sort so that rows with a long common prefix are neighbours. Any order gives right groups; the
    # comparison of few blocks, at doubling distances, nearly always gives the best.
    depths = 2 ** np.arange(int(num_pages.max()).bit_length()) - 1
    places = rows[sharers] * block_tables.shape[1] + depths[::-1, None]
    sharers = sharers[np.lexsort(block_tables.reshape(-1).take(places))]
    num_pages = (context_lens[sharers] - 1) // block_size
    common = _common_pages(block_tables, rows[sharers], np.minimum(num_pages[1:], num_pages[:-1]))
    ranges, gain = _best_ranges(common.tobytes(), block_size, tile_tokens, group)
    if not len(ranges):
        return NO_GROUPS
    members = np.concatenate([sharers[start:end] for start, end, _ in ranges])
    return Groups(members, ranges[:, 1] - ranges[:, 0], ranges[:, 2], gain)


def _common_pages(block_tables: np.ndarray, rows: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Number of blocks at the beginning that each row has in common with the next row, at most the
    pair's limit."""
    common = limits.copy()
    pairs = np.arange(len(limits))
    agree = np.full(len(limits), True)  # so far
    longest = int(limits.max())
    for start in range(0, longest, CHUNK):
        pages = block_tables[rows, start : min(start + CHUNK, longest)]
        differ = pages[1:] != pages[:-1]
        first = differ.argmax(1)
        found = agree & differ[pairs, first]
        common[found] = np.minimum(limits, start + first)[found]
        agree &= ~found & (limits > start + CHUNK)
        if not agree.any():
            break
    return common


@lru_cache(maxsize=8)  # the arguments stay the same until rows start or end
def _best_ranges(
    common_pages: bytes, block_size: int, tile_tokens: int, group: int
) -> tuple[np.ndarray, int]:
    """The ranges of neighbours with the largest gain as groups: [groups, (start, end, blocks)], and
    that gain. Neighbours form a tree: a range is divided where the common prefix is shortest."""
    common = np.frombuffer(common_pages, np.int64)
    ranges, parents = [(0, len(common) + 1)], [-1]
    num_pages, gains = [], []
    for i, (start, end) in enumerate(ranges):  # the loop appends to ranges
        inner = common[start : end - 1]
        num_pages.append(int(inner.min()))
        gains.append(gain_of(end - start, num_pages[i] * block_size, tile_tokens, group))
        cuts = start + 1 + np.flatnonzero(inner == num_pages[i])
        bounds = np.concatenate(([start], cuts, [end]))
        large = np.flatnonzero(np.diff(bounds) > 2)
        ranges += zip(bounds[large].tolist(), bounds[large + 1].tolist(), strict=True)
        parents += [i] * len(large)
    inside = [0] * len(ranges)  # largest gain of groups inside each range
    for i in reversed(range(1, len(ranges))):
        inside[parents[i]] += max(gains[i], inside[i])
    total = max(gains[0], inside[0])
    taken, done = [], [False] * len(ranges)
    for i, (start, end) in enumerate(ranges):
        done[i] = parents[i] >= 0 and done[parents[i]]
        if not done[i] and gains[i] > 0 and gains[i] >= inside[i]:
            taken.append((start, end, num_pages[i]))
            done[i] = True
    return np.array(taken, np.int64).reshape(-1, 3), total
