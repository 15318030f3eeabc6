"""Another eviction rule: blocks that were never hit are reused first.

python docs/hacking/cache_eviction.py

The rule of the package is least recently used: a flood of prompts that are seen once evicts a
system prompt that comes back. Here a block proves itself by a hit (segmented LRU).
"""

from collections import Counter

import numpy as np

from nanovllm import LLM, SamplingParams
from nanovllm.engine import block_manager
from nanovllm.engine.block_manager import BlockPool


class KeepHits(BlockPool):
    """Free blocks without a hit stand before all blocks with one."""

    def __init__(self, group):
        super().__init__(group)
        self.hits: Counter = Counter()  # contents -> prefix hits

    def share(self, blocks: np.ndarray, row: int) -> None:
        """The sequence of a row hits these blocks, [n] int32."""
        super().share(blocks, row)
        self.hits.update(self.contents[block] for block in blocks.tolist())

    def give_back(self, blocks: np.ndarray) -> None:
        """A sequence holds these blocks, [n] int32, no longer."""
        super().give_back(blocks)
        for block in reversed(blocks.tolist()):
            if block in self.free_blocks and not self.hits[self.contents[block]]:
                self.free_blocks.move_to_end(block, last=False)


def cached_tokens(pool: type[BlockPool]) -> int:
    """Prefix hits of a system prompt that returns after a flood of other prompts."""
    original, block_manager.BlockPool = block_manager.BlockPool, pool
    try:
        llm = LLM("assets/tiny-qwen3", max_model_len=128, num_gpu_blocks_override=32, block_size=4)
        params = SamplingParams(temperature=0, max_tokens=1)
        system = list(range(100, 148))
        flood = [list(range(300 + 40 * i, 340 + 40 * i)) for i in range(8)]
        for prompt in [system, system, *flood]:
            llm.generate([prompt], params, use_tqdm=False)
        return llm.generate([system], params, use_tqdm=False)[0].num_cached_tokens
    finally:
        block_manager.BlockPool = original


def main() -> list[int]:
    hits = [cached_tokens(BlockPool), cached_tokens(KeepHits)]
    print("tokens of 48 that are hit: least recently used {}, keep hits {}".format(*hits))
    return hits


if __name__ == "__main__":
    main()
