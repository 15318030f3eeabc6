"""Finds decodes whose block tables begin with the same pages (a system prompt, samples of one
prompt), for attention.py: the keys that they share are read once a step.

Source: Hydragen (Juravsky et al. 2024); FlashInfer's cascade attention (Ye et al. 2025). One level
of sharing is used: every decode is in one group at most.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

CHUNK = 128  # pages that are compared at a time


class Groups(NamedTuple):
    """Groups of decodes.

    Attributes:
        members: [members of all groups] indices of decodes, those of one group after another's.
        sizes: [groups] members of each.
        num_pages: [groups] pages that all members of the group begin with.
        gain: what they save, in keys read, by gain_of.
    """

    members: np.ndarray
    sizes: np.ndarray
    num_pages: np.ndarray
    gain: int


NOBODY = Groups(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.int64), 0)


def gain_of(size: int, num_keys: int, tile_tokens: int, group: int) -> int:
    """What a group of so many decodes saves, in keys read by one head: everybody's reading of the
    shared keys, but for each tile's. A tile has rows for many more decodes and computes for all,
    so it counts twice. A partial result is written and read in float32, which is 2 * `group` keys
    of 16 bits, and there are about three for each decode, one of them of its own keys."""
    num_tiles = -(-size // tile_tokens)
    return (size - 2 * num_tiles) * num_keys - 6 * group * size


def max_tiles(num_decodes: int) -> int:
    """Tiles of all groups at most: gain_of is positive only for more than two decodes a tile."""
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
    """The groups that save most. Every member has keys of its own behind the shared ones.

    Args:
        block_tables: [rows, pages].
        rows, context_lens: [decodes].
        tile_tokens: decodes a tile.
        group: query heads that share a key/value head.
    """
    first_page = block_tables[rows, 0]
    order = np.argsort(first_page, kind="stable")
    alike = np.concatenate(([False], np.diff(first_page[order]) == 0, [False]))
    if not (alike[1:] & alike[:-1]).any():
        return NOBODY  # no three begin with the same page
    sharers = order[alike[1:] | alike[:-1]]
    num_pages = (context_lens[sharers] - 1) // block_size
    if not num_pages.any():
        return NOBODY
    # Rows that share much shall be neighbours. Any order is right; in one by few pages, ever
    # further apart, they nearly always are.
    depths = 2 ** np.arange(int(num_pages.max()).bit_length()) - 1
    places = rows[sharers] * block_tables.shape[1] + depths[::-1, None]
    sharers = sharers[np.lexsort(block_tables.reshape(-1).take(places))]
    num_pages = (context_lens[sharers] - 1) // block_size
    common = _common_pages(block_tables, rows[sharers], np.minimum(num_pages[1:], num_pages[:-1]))
    ranges, gain = _best_ranges(common.tobytes(), block_size, tile_tokens, group)
    if not len(ranges):
        return NOBODY
    members = np.concatenate([sharers[start:end] for start, end, _ in ranges])
    return Groups(members, ranges[:, 1] - ranges[:, 0], ranges[:, 2], gain)


def _common_pages(block_tables: np.ndarray, rows: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many first pages each row has in common with the next, up to a limit for each pair."""
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


@lru_cache(maxsize=8)  # the same from step to step until rows start or end
def _best_ranges(
    common_pages: bytes, block_size: int, tile_tokens: int, group: int
) -> tuple[np.ndarray, int]:
    """The ranges of neighbours that save most as groups: [groups, (start, end, pages)], and their
    gain. Neighbours form a tree: a range is divided where they have least in common."""
    common = np.frombuffer(common_pages, np.int64)
    ranges, parents = [(0, len(common) + 1)], [-1]
    num_pages, gains = [], []
    for i, (start, end) in enumerate(ranges):  # it grows
        inner = common[start : end - 1]
        num_pages.append(int(inner.min()))
        gains.append(gain_of(end - start, num_pages[i] * block_size, tile_tokens, group))
        cuts = start + 1 + np.flatnonzero(inner == num_pages[i])
        bounds = np.concatenate(([start], cuts, [end]))
        large = np.flatnonzero(np.diff(bounds) > 2)
        ranges += zip(bounds[large].tolist(), bounds[large + 1].tolist(), strict=True)
        parents += [i] * len(large)
    inside = [0] * len(ranges)  # the most that parts of a range save
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
