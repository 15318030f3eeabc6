"""PagedAttention's pages: who holds which, what the free ones still contain, and which to reuse
first.

The scheduler asks for pages and gives them back; the worker only ever sees page numbers. Source of
the scheme: Kwon et al. 2023 (PagedAttention) and vLLM's automatic prefix caching.
"""

from collections import OrderedDict
from struct import Struct

from xxhash import xxh3_64_intdigest

from nanovllm.engine.sequence import Sequence

# What a cached page holds: a hash that chains over all pages before it; the serial number of the
# page before it (0: it is a first page); its tokens. A hit must agree in all three, so contents
# whose hashes collide are never taken for each other.
Content = tuple[int, int, bytes]


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
        self.pack_tokens = Struct(f"{block_size}i").pack
        self.ref_counts = [0] * num_blocks
        self.contents: list[Content | None] = [None] * num_blocks
        self.serials = [0] * num_blocks  # of each content, never used twice
        self.num_contents = 0
        self.cached: dict[int, int] = {}  # hash -> the page that holds such a content
        # Least recently used first; pages without content stand before those with.
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self.free_blocks)

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
        seq.cached_parent = self.serials[hits[-1]] if hits else 0
        return len(hits) * self.block_size

    def append(self, seq: Sequence) -> int:
        """Give a sequence one more page."""
        block = self._take()
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
            key, tokens = self._hashed(seq, seq.num_registered)
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
        for block in reversed(seq.block_table):
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks[block] = None
                if self.contents[block] is None:
                    self.free_blocks.move_to_end(block, last=False)
        seq.block_table = []

    def _forget(self, block: int) -> None:
        self.contents[block] = None
        if block in self.free_blocks:
            self.free_blocks.move_to_end(block, last=False)

    def _take(self) -> int:
        block, _ = self.free_blocks.popitem(last=False)
        content = self.contents[block]
        if content is not None:
            del self.cached[content[0]]
            self.contents[block] = None
        self.ref_counts[block] = 1
        return block

    def _find_prefix(self, seq: Sequence) -> list[int]:
        hits: list[int] = []
        if not self.enable_prefix_caching:
            return hits
        parent = 0
        for i in range(len(seq.token_ids) // self.block_size):
            key, tokens = self._hashed(seq, i)
            block = self.cached.get(key)
            if block is None or self.contents[block] != (key, parent, tokens):
                break
            hits.append(block)
            parent = self.serials[block]
        return hits

    def _hashed(self, seq: Sequence, index: int) -> tuple[int, bytes]:
        """The chained hash and the tokens of a full page."""
        hashed, size = seq.hashed_blocks, self.block_size
        while len(hashed) <= index:
            start = len(hashed) * size
            tokens = self.pack_tokens(*seq.token_ids[start : start + size])
            seed = hashed[-1][0] if hashed else 0
            hashed.append((xxh3_64_intdigest(tokens, seed=seed), tokens))
        return hashed[index]
