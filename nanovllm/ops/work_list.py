"""Divides a step's attention into items of like size, for triton_attention.py.

It works on the host, from lengths that the worker knows without asking the device.
"""

from typing import TypeVar

import numpy as np

IntOrArray = TypeVar("IntOrArray", int, np.ndarray)

ITEM_WIDTH = 9


def max_items(num_tiles: int, num_kv_heads: int, num_units: int) -> int:
    """Items that work_list makes at most: an even share more than the tiles, by its own bound on
    the size of a part."""
    return num_tiles + num_units // num_kv_heads


def max_slots(num_kv_heads: int, num_units: int) -> int:
    """Slots for partial results that work_list uses at most. A tile that is split has more keys
    than an even share, so there are at most units / heads of them, and one part more each."""
    return max(1, 2 * (num_units // num_kv_heads))


def work_list(
    rows: np.ndarray,
    query_start: np.ndarray,
    query_lens: np.ndarray,
    context_lens: np.ndarray,
    *,
    tile_tokens: int,
    num_kv_heads: int,
    num_units: int,
    min_keys: int,
) -> np.ndarray:
    """The items of some sequences, longest first, so that the last to start are short.

    Args:
        rows: [S] of the block tables.
        query_start: [S] each sequence's first query token in the batch.
        query_lens, context_lens: [S].
        tile_tokens: query tokens a tile.
        num_kv_heads: programs an item is run by.
        num_units: programs that keep the device busy; tiles are split to get so many.
        min_keys: a part starts at a multiple of it.

    Returns: [items, ITEM_WIDTH] int32. An item is a tile and a part of its keys:
        0 row of the block tables
        1 the tile's first query token in the batch
        2 its query tokens
        3 the first one's position in its sequence
        4, 5 the part's first key, and the end of its keys
        6 slot for the partial result; -1: the item has all keys, there is nothing to merge
        7 slot of the tile's first part
        8 the tile's parts
    """
    num_tiles = _ceil_div(query_lens, tile_tokens)
    seq, tile_of_seq = _repeat(num_tiles)
    first_token = tile_of_seq * tile_tokens
    num_tokens = np.minimum(tile_tokens, query_lens[seq] - first_token)
    position = (context_lens - query_lens)[seq] + first_token
    num_keys = position + num_tokens

    even_share = _ceil_div(int(num_keys.sum()) * num_kv_heads, num_units)
    most_keys = _ceil_div(even_share, min_keys) * min_keys
    num_parts = _ceil_div(num_keys, most_keys)
    part_keys = _ceil_div(_ceil_div(num_keys, num_parts), min_keys) * min_keys
    num_parts = _ceil_div(num_keys, part_keys)
    tile, part = _repeat(num_parts)
    is_split = num_parts > 1
    num_slots = np.where(is_split, num_parts, 0)
    first_slot = num_slots.cumsum() - num_slots
    key_start = part * part_keys[tile]
    key_end = np.minimum(key_start + part_keys[tile], num_keys[tile])

    items = np.empty((len(tile), ITEM_WIDTH), np.int32)
    items[:, 0] = rows[seq][tile]
    items[:, 1] = (query_start[seq] + first_token)[tile]
    items[:, 2] = num_tokens[tile]
    items[:, 3] = position[tile]
    items[:, 4] = key_start
    items[:, 5] = key_end
    items[:, 6] = np.where(is_split[tile], first_slot[tile] + part, -1)
    items[:, 7] = first_slot[tile]
    items[:, 8] = num_parts[tile]
    return items[np.argsort(key_start - key_end, kind="stable")]


def _ceil_div(a: IntOrArray, b: IntOrArray | int) -> IntOrArray:
    return -(-a // b)


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index as often as it counts, and the running number within."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]
