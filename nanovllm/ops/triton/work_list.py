"""Divide a step's attention into items of similar size: the work list of attention_kernel.py.

attention.py calls it, on the host, with lengths that the worker knows without the device.
"""

from typing import NamedTuple

import numpy as np

from nanovllm.ops.triton.kernel_configs import cdiv

ITEM_WIDTH = 13


class Sizes(NamedTuple):
    """The sizes that work is divided by.

    Attributes:
        tile_tokens: query tokens in a tile.
        num_kv_heads: CTAs that compute an item.
        num_units: CTAs that keep the device busy; tiles are split until the list has this number.
        min_keys: the keys of a part are a multiple of it, except in a tile's last part.
    """

    tile_tokens: int
    num_kv_heads: int
    num_units: int
    min_keys: int

    @property
    def num_extra(self) -> int:
        """Upper bound of the items beyond one for each tile: work_list never makes parts smaller
        than an even share."""
        return self.num_units // self.num_kv_heads


class Prefixes(NamedTuple):
    """The shared prefix of each sequence: keys that other items attend to for its query token, and
    the place of their results. All arrays are [S], 0 for sequences without a shared prefix.

    Attributes:
        num_keys: number of keys in the prefix.
        first_slot: first slot of the tile that the query token is in.
        token: index of the query token in the tile.
        num_tokens, num_parts: query tokens and parts of the tile.
    """

    num_keys: np.ndarray
    first_slot: np.ndarray
    token: np.ndarray
    num_tokens: np.ndarray
    num_parts: np.ndarray


def max_items(num_tiles: int, sizes: Sizes) -> int:
    """Upper bound of the items that work_list makes."""
    return num_tiles + sizes.num_extra


def max_slots(num_decodes: int, sizes: Sizes) -> int:
    """Upper bound of the slots for partial results that work_list uses. A tile that is split has
    more keys than an even share, so at most units / heads tiles are split, with one part more each;
    and each decode may have a prefix."""
    return num_decodes + sizes.tile_tokens * max(1, 2 * sizes.num_extra)


def max_shared_slots(num_decodes: int, sizes: Sizes) -> int:
    """Upper bound of the slots that work_list uses for shared keys: one for each decode, and the
    slots of a tile for each part beyond the first."""
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
    """The items of some sequences, longest first, so that short items start last.

    Args:
        rows: [S] rows of the block tables.
        query_start: [S] each sequence's first query token in the batch.
        query_lens, context_lens: [S] query tokens and keys of each sequence.
        prefixes: shared prefixes, whose keys are left out because other items attend to them. All
            parts of sequences with a prefix have partial results.
        shared_from: not None: the list is for shared keys. Then a "sequence" is a set of decodes,
            each with one query token, and all query tokens see all keys; every part has a partial
            result, and the first one lies in this slot.

    Returns: [items, ITEM_WIDTH] int32. An item is a tile and a part of its keys:
        0 row of the block tables
        1 the tile's first query token in the batch
        2 its query tokens
        3 position of the first query token in its sequence; for shared keys the last key
        4, 5 the part's first key, and the end of its keys
        6 first slot of the partial result, which takes a slot for each query token; -1: the item
          has all keys, and needs no merge
        7 first slot of the tile's first part; the slots of the other parts follow
        8 number of the tile's parts
        9 to 12 first_slot, token, num_tokens and num_parts of Prefixes
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
    """The shared prefixes that a work list of shared keys serves.

    Args:
        items: the work list.
        members: the decodes that are the items' query tokens.
        num_seqs: number of sequences in the step.
    """
    prefixes = Prefixes(*np.zeros((5, num_seqs), np.int64))
    tiles = items[items[:, 6] == items[:, 7]]  # the first part of each tile
    tile, token = _repeat(tiles[:, 2])
    seqs = members[tiles[tile, 1] + token]
    prefixes.num_keys[seqs] = tiles[tile, 3] + 1
    prefixes.first_slot[seqs] = tiles[tile, 7]
    prefixes.token[seqs] = token
    prefixes.num_tokens[seqs] = tiles[tile, 2]
    prefixes.num_parts[seqs] = tiles[tile, 8]
    return prefixes


def _repeat(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each index i counts[i] times, and the running number within its repetitions."""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]
