"""PagedAttention's pages: who holds which, what the free ones still contain, and which to reuse
first.

The scheduler asks for pages and gives them back; the worker only ever sees page numbers. Source of
the scheme: Kwon et al. 2023 (PagedAttention) and vLLM's automatic prefix caching.
"""

from array import array
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from xxhash import xxh3_64_intdigest

from nanovllm.engine.sequence import Sequence

# What a cached page holds: a hash that chains over all pages before it; the serial number of the
# page before it (0: it is a first page); its tokens. A hit must agree in all three, so contents
# whose hashes collide are never taken for each other.
Content = tuple[int, int, bytes]


class Lookup(NamedTuple):
    """A sequence's tokens, the hashes of its full pages as far as they are known, the pages that
    were hit, and how many contents were forgotten before."""

    tokens: bytes
    hashes: list[int]
    hits: "array[int]"
    num_forgotten: int


class BlockManager:
    """Hands out the cache's pages. Every page is free (perhaps with content that a later request
    may hit) or owned by one or more sequences. Every operation on a page is O(1); those on all
    pages of a prefix are few, on arrays, as hundreds of sequences may share it.

    Args:
        num_blocks: pages in the cache.
        block_size: tokens a page.
        enable_prefix_caching: whether sequences that start with the same tokens share pages.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.ref_counts = np.zeros(num_blocks, np.int32)
        # Who took it, while nobody has shared it: it comes back when that one ends.
        self.owners: list[Sequence | None] = [None] * num_blocks
        self.contents: list[Content | None] = [None] * num_blocks
        self.serials = [0] * num_blocks  # of each content, never used twice
        self.num_contents = self.num_forgotten = 0
        self.cached: dict[int, int] = {}  # hash -> the page that holds such a content
        # Least recently used first; pages without content stand before those with.
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self.last_lookup = Lookup(b"", [], array("i"), 0)

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

    def num_pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def holders(self, blocks: "array[int]") -> tuple[int, list[Sequence]]:
        """How many of these pages sequences hold, and the owner of each that has one."""
        pages = np.array(blocks)
        counts = self.ref_counts[pages]
        held_once = pages[counts == 1].tolist()
        owners = [owner for block in held_once if (owner := self.owners[block])]
        return int(np.count_nonzero(counts)), owners

    def allocate(self, seq: Sequence, hits: "array[int]") -> None:
        """Give a sequence the pages for all its known tokens. As many must be free.

        Args:
            hits: what find_prefix found; these are shared.
        """
        if hits:
            pages = np.array(hits)
            counts = self.ref_counts[pages]
            for block in pages[counts < 2].tolist():
                is_free = block in self.free_blocks
                self.owners[block] = seq if is_free else None
                if is_free:
                    del self.free_blocks[block]
            self.ref_counts[pages] = counts + 1
        seq.block_table = hits[:]
        for _ in range(self.num_pages(len(seq.token_ids)) - len(hits)):
            self.append(seq)
        seq.num_registered = len(hits)
        seq.cached_parent = self.serials[hits[-1]] if hits else 0

    def append(self, seq: Sequence) -> int:
        """Give a sequence one more page."""
        block = self._take(seq)
        seq.block_table.append(block)
        return block

    def register(self, seq: Sequence, num_computed: int) -> None:
        """Offer the sequence's full pages to the prefix cache, as far as their tokens are known and
        are computed by the steps submitted so far. Steps run in order and store a batch's keys and
        values before they attend, so a page may be hit from this very step on."""
        if not self.enable_prefix_caching:
            return
        num_full = min(num_computed, len(seq.token_ids)) // self.block_size
        while seq.num_registered < num_full:
            block = seq.block_table[seq.num_registered]
            key, tokens = self._page(seq, seq.num_registered)
            content = (key, seq.cached_parent, tokens)
            holder = self.cached.get(key)
            if holder is None or self.contents[holder] != content:
                if holder is not None:  # a collision, or its parent is gone: the newest stays
                    self._forget(holder)
                self.num_contents += 1
                self.cached[key], self.contents[block] = block, content
                self.serials[block] = self.num_contents
                holder = block
            seq.cached_parent = self.serials[holder]
            seq.num_registered += 1

    def free(self, seq: Sequence) -> None:
        """Take a sequence's pages back. The last ones are reused first: a prefix is worth more than
        what follows it."""
        pages = np.array(seq.block_table)[::-1]
        counts = self.ref_counts[pages] - 1
        self.ref_counts[pages] = counts
        for block in pages[counts == 0].tolist():
            self.owners[block] = None
            self.free_blocks[block] = None
            if self.contents[block] is None:
                self.free_blocks.move_to_end(block, last=False)
        seq.block_table = array("i")

    def _forget(self, block: int) -> None:
        self.contents[block] = None
        self.num_forgotten += 1
        if block in self.free_blocks:
            self.free_blocks.move_to_end(block, last=False)

    def _take(self, seq: Sequence) -> int:
        block, _ = self.free_blocks.popitem(last=False)
        content = self.contents[block]
        if content is not None:
            del self.cached[content[0]]
            self._forget(block)
        self.ref_counts[block] = 1
        self.owners[block] = seq
        return block

    def find_prefix(self, seq: Sequence) -> "array[int]":
        """The cached pages of the longest prefix of a sequence's known tokens. Where it begins like
        the sequence before, as many do that share a prefix, only the rest is looked up."""
        if not self.enable_prefix_caching:
            return array("i")
        last, tokens = self.last_lookup, seq.token_ids.tobytes()
        num_equal = _num_equal(last.tokens, tokens) // self.block_size
        if not seq.block_hashes:
            seq.block_hashes = last.hashes[:num_equal]
        # What was hit is still there if nothing is gone since then.
        hits = last.hits[: num_equal if last.num_forgotten == self.num_forgotten else 0]
        parent = self.serials[hits[-1]] if hits else 0
        for i in range(len(hits), len(seq.token_ids) // self.block_size):
            key, page_tokens = self._page(seq, i)
            block = self.cached.get(key)
            if block is None or self.contents[block] != (key, parent, page_tokens):
                break
            hits.append(block)
            parent = self.serials[block]
        self.last_lookup = Lookup(tokens, seq.block_hashes, hits, self.num_forgotten)
        return hits

    def _page(self, seq: Sequence, index: int) -> tuple[int, bytes]:
        """The chained hash of a full page, and its tokens."""
        hashes, size = seq.block_hashes, self.block_size
        for i in range(min(len(hashes), index), index + 1):
            tokens = seq.token_ids[i * size : (i + 1) * size].tobytes()
            if i == len(hashes):
                hashes.append(xxh3_64_intdigest(tokens, seed=hashes[-1] if hashes else 0))
        return hashes[index], tokens


def _num_equal(a: bytes, b: bytes) -> int:
    """With how many equal tokens both begin."""
    a_tokens, b_tokens = np.frombuffer(a, np.uint32), np.frombuffer(b, np.uint32)
    n = min(len(a_tokens), len(b_tokens))
    differ = a_tokens[:n] != b_tokens[:n]
    first = int(differ.argmax()) if n else 0
    return first if n and differ[first] else n
