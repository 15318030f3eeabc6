"""PagedAttention's blocks: which sequences hold them, what the free ones still contain, and which
are reused first.

The scheduler takes blocks for sequences and gives them back; the worker only sees block numbers.
Source of the scheme: Kwon et al. 2023 (PagedAttention) and vLLM's automatic prefix caching.
"""

from array import array
from collections import OrderedDict

import numpy as np

from nanovllm.core.step import CacheGroup
from nanovllm.engine.sequence import Sequence

# What a full block contains: the number of the prefix before it (0: none), and its own tokens.
Content = tuple[int, bytes]


class BlockPool:
    """The blocks of one group of layers. A block is free, perhaps with content that a later request
    can hit, or held by one or more sequences.

    Args:
        group: how many blocks there are, and what queries see of them.

    Attributes:
        window_blocks: how many of a prefix's last blocks the next query sees at most.
        ref_counts: [num_blocks] sequences that hold the block.
        owners: [num_blocks] row of the sequence at whose end the block is free: it took the block,
            and no other sequence has held the block since; -1: no such sequence.
        contents: [num_blocks] what the prefix cache knows of the block; None: nothing.
        cached: prefix -> the block that ends it, the first one that was registered.
        free_blocks: least recently used first; blocks without content come before all others.
    """

    def __init__(self, group: CacheGroup):
        self.num_blocks, self.window = group.num_blocks, group.window
        reach = group.num_blocks * group.block_size if group.window is None else group.window
        self.window_blocks = -(-reach // group.block_size)
        self.ref_counts = np.zeros(group.num_blocks, np.int32)
        self.owners = np.full(group.num_blocks, -1, np.int32)
        self.contents: list[Content | None] = [None] * group.num_blocks
        self.cached: dict[int, int] = {}
        self.free_blocks: OrderedDict[int, None] = OrderedDict.fromkeys(range(group.num_blocks))

    def num_owned(self, num_rows: int, shared: np.ndarray) -> np.ndarray:
        """[rows] how many blocks each row owns, but for blocks that are to be shared, [n] int32;
        -1 is none."""
        owned = np.bincount(self.owners + 1, minlength=num_rows + 1)
        if shared.size:
            owned -= np.bincount(self.owners[shared[shared >= 0]] + 1, minlength=num_rows + 1)
        return owned[1:]

    def share(self, blocks: np.ndarray, row: int) -> None:
        """The sequence of a row holds blocks with content, [n] int32, whoever else does."""
        counts = self.ref_counts[blocks]
        free = blocks[counts == 0]
        self.owners[blocks[counts == 1]], self.owners[free] = -1, row
        self.ref_counts[blocks] = counts + 1
        for block in free.tolist():
            del self.free_blocks[block]

    def give_back(self, blocks: np.ndarray) -> None:
        """A sequence holds these blocks, [n] int32, no longer. If free, they are reused in this
        order."""
        counts = self.ref_counts[blocks] - 1
        self.ref_counts[blocks] = counts
        free = blocks[counts == 0]
        self.owners[free] = -1
        for block in free.tolist():
            self.free_blocks[block] = None
            if self.contents[block] is None:
                self.free_blocks.move_to_end(block, last=False)


class BlockManager:
    """Block tables of sequences, one in each group of layers, and the prefix cache over all groups.
    All tables of a sequence have one length: block i of each holds the same positions. A block that
    lies outside the group's window is freed while the sequence runs; its place in the table is -1.

    The prefix cache knows prefixes, whole blocks long, by numbers that are never used twice. A
    lookup goes from one to the next by the tokens of the block between, so no block is ever taken
    for one with other contents. A prefix is known for as long as a block of some group ends it. (So
    where all groups have windows, hits end where the first block of a prefix was reused.)

    Args:
        groups: the groups of layers, all of one block size.
        enable_prefix_caching: whether sequences that start with the same tokens share blocks.

    Attributes:
        prefixes: contents of a block -> the prefix that it ends.
        num_prefixes: how many have been known.
        last_tokens, last_path: of the last lookup, and all prefixes that it found.
    """

    def __init__(self, groups: tuple[CacheGroup, ...], enable_prefix_caching: bool = True):
        self.groups = groups
        self.block_size = groups[0].block_size
        assert all(group.block_size == self.block_size for group in groups)
        self.enable_prefix_caching = enable_prefix_caching
        self.pools = [BlockPool(group) for group in groups]
        self.window_blocks = np.array([[pool.window_blocks] for pool in self.pools])  # [groups, 1]
        self.has_windows = any(group.window is not None for group in groups)
        self.prefixes: dict[Content, int] = {}
        self.num_prefixes = 0
        self.last_tokens, self.last_path = np.empty(0, np.uint32), list[int]()

    @property
    def num_blocks(self) -> int:
        """Blocks of the smallest group."""
        return min(pool.num_blocks for pool in self.pools)

    @property
    def num_free(self) -> int:
        """Blocks that are free in every group."""
        return min(len(pool.free_blocks) for pool in self.pools)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def find_prefix(self, seq: Sequence) -> np.ndarray:
        """The cached blocks of a sequence's longest prefix that all groups have, [groups, blocks]
        int32. A group with a window needs only the last window of the prefix; before it, the blocks
        are -1."""
        size = self.block_size
        if not self.prefixes or not (num_blocks := seq.num_cacheable // size):
            return np.empty((len(self.pools), 0), np.int32)
        # Where it begins like the last sequence, as is common, only the rest is looked up.
        tokens, last_tokens = np.array(seq.token_ids[: num_blocks * size]), self.last_tokens
        num_common = min(len(tokens), len(last_tokens))
        differ = np.flatnonzero(tokens[:num_common] != last_tokens[:num_common])
        num_equal = int(differ[0]) if differ.size else num_common
        path = self.last_path[: num_equal // size]
        prefix, rest = path[-1] if path else 0, tokens[len(path) * size :].tobytes()
        for start in range(0, len(rest), 4 * size):
            prefix = self.prefixes.get((prefix, rest[start : start + 4 * size]), 0)
            if not prefix:
                break
            path.append(prefix)
        self.last_tokens, self.last_path = tokens, path
        blocks = np.array([[pool.cached.get(p, -1) for p in path] for pool in self.pools], np.int32)
        if (len(self.pools) == 1 and not self.has_windows) or not path:
            return blocks
        index = np.arange(len(path))
        # A prefix that ends with block i is a hit if no block of its last window is missing.
        last_missing = np.maximum.accumulate(np.where(blocks < 0, index, -1), axis=1)
        is_hit = index - last_missing >= np.minimum(index + 1, self.window_blocks)
        num_hits = 1 + np.flatnonzero(is_hit.all(axis=0)).max(initial=-1)
        return np.where(index[:num_hits] < num_hits - self.window_blocks, -1, blocks[:, :num_hits])

    def num_needed(self, seq: Sequence, hits: np.ndarray) -> list[int]:
        """How many free blocks of each group `allocate` would take."""
        num_new = self.blocks_for(len(seq.token_ids)) - hits.shape[1]
        if not hits.size:
            return [num_new] * len(self.pools)
        held = [row[row >= 0] for row in hits]
        return [
            num_new + int(np.count_nonzero(pool.ref_counts[blocks] == 0))
            for pool, blocks in zip(self.pools, held, strict=True)
        ]

    def allocate(self, seq: Sequence, hits: np.ndarray) -> None:
        """Give a sequence, which has its row, the blocks of all its known tokens; num_needed must
        be free.

        Args:
            hits: what find_prefix found; these blocks are shared.
        """
        num_hits = hits.shape[1]
        if num_hits:
            last = self.pools[0].contents[hits[0, -1]]
            assert last is not None
            seq.prefix = self.prefixes[last]
            for pool, blocks in zip(self.pools, hits, strict=True):
                pool.share(blocks[blocks >= 0], seq.row)
        seq.num_registered = num_hits
        seq.block_tables = [array("i", blocks.tobytes()) for blocks in hits]
        num_new = self.blocks_for(len(seq.token_ids)) - num_hits
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            table.extend(self._take(pool, np.full(num_new, seq.row)))

    def append(self, seqs: list[Sequence], rows: np.ndarray) -> np.ndarray:
        """Give each of these sequences, which run in these rows, one more block in each group.
        Returns the blocks, [groups, n] int32."""
        blocks = np.array([self._take(pool, rows) for pool in self.pools], np.int32)
        for seq, new in zip(seqs, blocks.T.tolist(), strict=True):
            for table, block in zip(seq.block_tables, new, strict=True):
                table.append(block)
        return blocks

    def register(self, seq: Sequence, num_computed: int) -> None:
        """Offer a sequence's full blocks to the prefix cache, as far as their tokens are known and
        are computed by the steps submitted so far. Steps run in order and store a batch's keys and
        values before they attend, so a block may be hit from this very step on."""
        num_full = min(num_computed, len(seq.token_ids)) // self.block_size
        if not self.enable_prefix_caching:
            return
        for i in range(seq.num_registered, num_full):
            tokens = seq.token_ids[i * self.block_size : (i + 1) * self.block_size].tobytes()
            content = (seq.prefix, tokens)
            prefix = self.prefixes.get(content)
            if prefix is None:
                self.num_prefixes = prefix = self.num_prefixes + 1
                self.prefixes[content] = prefix
            for pool, table in zip(self.pools, seq.block_tables, strict=True):
                if prefix not in pool.cached:
                    pool.cached[prefix], pool.contents[table[i]] = table[i], content
            seq.prefix, seq.num_registered = prefix, i + 1

    def free_outside(self, seq: Sequence, position: int) -> None:
        """Free the blocks that no query of a sequence sees from a position on."""
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            if pool.window is None:
                continue
            end = start = max(0, position - pool.window + 1) // self.block_size
            while start > 0 and table[start - 1] >= 0:
                start -= 1
            if start < end:
                pool.give_back(np.array(table[start:end])[::-1])
                table[start:end] = array("i", [-1] * (end - start))

    def free(self, seq: Sequence) -> None:
        """Take all of a sequence's blocks back. The last ones are reused first: a prefix is worth
        more than what follows it."""
        for pool, table in zip(self.pools, seq.block_tables, strict=True):
            blocks = np.array(table)[::-1]
            pool.give_back(blocks[blocks >= 0] if pool.window is not None else blocks)
        seq.block_tables = []

    def _take(self, pool: BlockPool, rows: np.ndarray) -> list[int]:
        """A free block for the sequence of each row; what the blocks contained is forgotten."""
        blocks = [pool.free_blocks.popitem(last=False)[0] for _ in range(len(rows))]
        for block in blocks:
            content = pool.contents[block]
            if content is not None:
                pool.contents[block], prefix = None, self.prefixes[content]
                del pool.cached[prefix]
                if len(self.pools) == 1 or not any(prefix in p.cached for p in self.pools):
                    del self.prefixes[content]
                    self.last_path = []
        index = np.array(blocks, np.int64)
        pool.ref_counts[index], pool.owners[index] = 1, rows
        return blocks
