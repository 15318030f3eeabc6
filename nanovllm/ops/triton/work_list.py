"""Divides a step's attention into items of like size, for attention.py.

It works on the host, from lengths that the worker knows without asking the device.
"""

from typing import NamedTuple

import numpy as np

from nanovllm.ops.triton.kernel_configs import cdiv

ITEM_WIDTH = 13


class Sizes(NamedTuple):
    """What work is divided by.

    Attributes:
        tile_tokens: query tokens a tile.
        num_kv_heads: programs an item is run by.
        num_units: programs that keep the device busy; tiles are split to get so many.
        min_keys: a part has a multiple of so many keys, but for a tile's last.
    """

    tile_tokens: int
    num_kv_heads: int
    num_units: int
    min_keys: int

    @property
    def num_extra(self) -> int:
        """Items beyond one for each tile at most: an even share, by work_list's own bound on the
        size of a part."""
        return self.num_units // self.num_kv_heads


class Prefixes(NamedTuple):
    """Keys that other items attend to for a sequence's query tokens, and where the results are.
    All are [S], and 0 where there are none.

    Attributes:
        num_keys: the first so many keys.
        first_slot: of the tile that they are in, as of an item.
        token: their place among the tile's query tokens.
        num_tokens, num_parts: of the tile.
    """

    num_keys: np.ndarray
    first_slot: np.ndarray
    token: np.ndarray
    num_tokens: np.ndarray
    num_parts: np.ndarray


def max_items(num_tiles: int, sizes: Sizes) -> int:
    """Items that work_list makes at most."""
    return num_tiles + sizes.num_extra


def max_slots(num_decodes: int, sizes: Sizes) -> int:
    """Slots for partial results that work_list uses at most. A tile that is split has more keys
    than an even share, so there are at most units / heads of them, and one part more each; and
    each decode may have a prefix."""
    return num_decodes + sizes.tile_tokens * max(1, 2 * sizes.num_extra)


def max_shared_slots(num_decodes: int, sizes: Sizes) -> int:
    """Slots that work_list uses at most for shared keys: one for each decode, and a tile's for each
    part beyond the first."""
    return num_decodes + sizes.tile_tokens * sizes.num_extra


def work_list(
    rows: np.ndarray,
    query_start: np.ndarray,
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    sizes: Sizes,
    *,
    prefixes: Prefixes | None = None,
    shared_from: int | None = None,
) -> np.ndarray:
    """The items of some sequences, longest first, so that the last to start are short.

    Args:
        rows: [S] of the block tables.
        query_start: [S] each sequence's first query token in the batch.
        query_lens, context_lens: [S].
        prefixes: keys that are left out, because others attend to them. All parts of sequences
            that have any leave partial results.
        shared_from: not None: these are such others. A sequence is a group of decodes, a query
            token one of them, and all of them see all keys; every part has a partial result, the
            first one's in this slot.

    Returns: [items, ITEM_WIDTH] int32. An item is a tile and a part of its keys:
        0 row of the block tables
        1 the tile's first query token in the batch
        2 its query tokens
        3 the first one's position in its sequence; of shared keys the last key
        4, 5 the part's first key, and the end of its keys
        6 the first slot of the partial result, which takes one for each query token; -1: the item
          has all keys, there is nothing to merge
        7 the first slot of the tile's first part; those of the others follow
        8 the tile's parts
        9 to 12 of a sequence with a prefix: first_slot, token, num_tokens and num_parts of Prefixes
    """
    tile_tokens, num_kv_heads, num_units, min_keys = sizes
    is_shared = shared_from is not None
    num_tiles = cdiv(query_lens, tile_tokens)
    seq, tile_of_seq = _repeat(num_tiles)
    first_token = tile_of_seq * tile_tokens
    num_tokens = np.minimum(tile_tokens, query_lens[seq] - first_token)
    if is_shared:
        position = context_lens[seq] - 1
        end = context_lens[seq]
    else:
        position = (context_lens - query_lens)[seq] + first_token
        end = position + num_tokens
    start = prefixes.num_keys[seq] if prefixes else np.zeros_like(end)
    num_keys = end - start

    even_share = cdiv(int(num_keys.sum()) * num_kv_heads, num_units)
    most_keys = cdiv(even_share, min_keys) * min_keys
    num_parts = cdiv(num_keys, most_keys)
    part_keys = cdiv(cdiv(num_keys, num_parts), min_keys) * min_keys
    num_parts = cdiv(num_keys, part_keys)
    tile, part = _repeat(num_parts)
    has_slots = (num_parts > 1) | is_shared
    if prefixes:
        has_slots |= prefixes.num_parts[seq] > 0
    num_slots = np.where(has_slots, num_parts * num_tokens, 0)
    first_slot = num_slots.cumsum() - num_slots + (shared_from or 0)
    key_start = start[tile] + part * part_keys[tile]
    key_end = np.minimum(key_start + part_keys[tile], end[tile])

    items = np.zeros((len(tile), ITEM_WIDTH), np.int32)
    items[:, 0] = rows[seq][tile]
    items[:, 1] = (query_start[seq] + first_token)[tile]
    items[:, 2] = num_tokens[tile]
    items[:, 3] = position[tile]
    items[:, 4] = key_start
    items[:, 5] = key_end
    items[:, 6] = np.where(has_slots[tile], first_slot[tile] + part * num_tokens[tile], -1)
    items[:, 7] = first_slot[tile]
    items[:, 8] = num_parts[tile]
    if prefixes:
        for column, values in enumerate(prefixes[1:], start=9):
            items[:, column] = values[seq][tile]
    return items[np.argsort(key_start - key_end, kind="stable")]


def prefixes_of(items: np.ndarray, members: np.ndarray, num_seqs: int) -> Prefixes:
    """What the items of shared keys leave to those of the sequences.

    Args:
        items: work_list's.
        members: the decodes that are the items' query tokens.
        num_seqs: of the step.
    """
    prefixes = Prefixes(*np.zeros((5, num_seqs), np.int64))
    tiles = items[items[:, 6] == items[:, 7]]  # their first parts
    tile, token = _repeat(tiles[:, 2])
    seqs = members[tiles[tile, 1] + token]
    prefixes.num_keys[seqs] = tiles[tile, 3] + 1
    prefixes.first_slot[seqs] = tiles[tile, 7]
    prefixes.token[seqs] = token
    prefixes.num_tokens[seqs] = tiles[tile, 2]
    prefixes.num_parts[seqs] = tiles[tile, 8]
    return prefixes


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as it counts, and the running number within."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]
