"""PagedAttention's pages: who holds which, what the free ones still contain, and which to reuse
first.

The scheduler asks for pages and gives them back; the worker only ever sees page numbers. Source of
the scheme: Kwon et al. 2023 (PagedAttention) and vLLM's automatic prefix caching.
"""

from array import array
from collections import OrderedDict
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from nanovllm.engine.sequence import Sequence


class BlockKey(NamedTuple):
    """What a full page contains. The hash chains over all pages before it; the other fields are
    checked on a hit, so two contents whose hashes collide are never taken for each other."""

    hash: int
    parent_hash: int
    tokens: bytes


class BlockManager:
    """Hands out the cache's pages. Every page is free (perhaps with content that a later request
    may hit) or owned by one or more sequences. Every operation on a page is O(1).

    Args:
        num_blocks: pages in the cache.
        block_size: tokens a page.
        enable_prefix_caching: whether sequences that start with the same tokens share pages.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = [0] * num_blocks
        self.keys: list[BlockKey | None] = [None] * num_blocks
        self.cached: dict[int, int] = {}  # hash -> the page that holds this content
        # Least recently used first; pages without content stand before those with.
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def needs_page(self, seq: Sequence) -> bool:
        """Whether the next token of a decoding sequence opens a new page."""
        return seq.num_computed == len(seq.block_table) * self.block_size

    def allocate(self, seq: Sequence) -> int | None:
        """Give a sequence the pages for all its known tokens, those of its longest cached prefix
        shared.

        Returns the number of tokens in shared pages, or None (and nothing changed) if too few pages
        are free.
        """
        hits = self._find_prefix(seq)
        num_new = -(-len(seq.token_ids) // self.block_size) - len(hits)
        if num_new > self.num_free - sum(self.ref_counts[block] == 0 for block in hits):
            return None
        for block in hits:
            self.free_blocks.pop(block, None)
            self.ref_counts[block] += 1
        seq.block_table = hits + [self._take() for _ in range(num_new)]
        seq.num_registered = len(hits)
        return len(hits) * self.block_size

    def append(self, seq: Sequence) -> int:
        """Give a sequence one more page."""
        block = self._take()
        seq.block_table.append(block)
        return block

    def register(self, seq: Sequence) -> None:
        """Offer the sequence's full pages to the prefix cache, as far as their tokens are known and
        are computed by the steps submitted so far. Steps run in order and store a batch's keys and
        values before they attend, so a page may be hit from this very step on."""
        if not self.enable_prefix_caching:
            return
        num_full = min(seq.num_computed, len(seq.token_ids)) // self.block_size
        while seq.num_registered < num_full:
            block, key = seq.block_table[seq.num_registered], self._key(seq, seq.num_registered)
            holder = self.cached.setdefault(key.hash, block)
            if holder == block:
                self.keys[block] = key
            elif self.keys[holder] != key:
                return  # a hash collision: nothing may chain to this page under that hash
            seq.num_registered += 1

    def free(self, seq: Sequence) -> None:
        """Take a sequence's pages back. The last ones are reused first: a prefix is worth more than
        what follows it."""
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None
                if self.keys[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table = []

    def _take(self) -> int:
        block, _ = self.free_blocks.popitem(last=False)
        key = self.keys[block]
        if key is not None:
            del self.cached[key.hash]
            self.keys[block] = None
        self.ref_counts[block] = 1
        return block

    def _find_prefix(self, seq: Sequence) -> list[int]:
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        for i in range(len(seq.token_ids) // self.block_size):
            key = self._key(seq, i)
            block = self.cached.get(key.hash)
            if block is None or self.keys[block] != key:
                break
            hits.append(block)
        return hits

    def _key(self, seq: Sequence, index: int) -> BlockKey:
        keys, size = seq.block_keys, self.block_size
        while len(keys) <= index:
            parent = keys[-1].hash if keys else 0
            start = len(keys) * size
            tokens = array("i", seq.token_ids[start : start + size]).tobytes()
            keys.append(BlockKey(xxh3_64_intdigest(tokens, seed=parent), parent, tokens))
        return keys[index]
