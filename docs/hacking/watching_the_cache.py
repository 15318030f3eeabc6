"""Watching the KV cache: how many blocks are held, shared and cached after each step.

python docs/hacking/watching_the_cache.py
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from nanovllm import LLM, SamplingParams


class Blocks(NamedTuple):
    """Numbers of blocks after a step."""

    held: int  # by at least one sequence
    shared: int  # by two sequences or more
    cached: int  # free, with content that a prefix hit can find
    hit_tokens: int  # tokens of prefix hits in the last step


def watch(llm: LLM) -> Iterator[Blocks]:
    """Run what `add_request` queued, and look at the cache after each step."""
    while not llm.is_finished():
        llm.step()
        engine = llm.llm_engine
        [pool] = engine.scheduler.block_manager.pools  # one for each group of layers
        held = pool.ref_counts > 0
        cached = np.array([content is not None for content in pool.contents])
        yield Blocks(
            held=int(held.sum()),
            shared=int((pool.ref_counts > 1).sum()),
            cached=sum(
                has_content
                for has_content, is_held in zip(cached, held, strict=True)
                if not is_held
            ),
            hit_tokens=engine.metrics.last_step.cached_tokens,
        )


def main() -> list[Blocks]:
    llm = LLM("assets/tiny-qwen3", max_model_len=128, block_size=4, num_gpu_blocks_override=64)
    for question in ("the sea", "a king", "a dog"):
        prompt = f"Tell me in a few plain words all that you know about {question}."
        llm.add_request(prompt, SamplingParams(temperature=0, max_tokens=16))
    steps = list(watch(llm))
    for number, blocks in enumerate(steps, 1):
        print(f"step {number:2}: " + ", ".join(f"{n} {k}" for k, n in blocks._asdict().items()))
    return steps


if __name__ == "__main__":
    main()
