"""How large the KV cache is: what the user says, what fits, what a GPU has left; and which layers
have a block table in common.

worker.py calls it before it loads weights, or after it has tried the largest step.
"""

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nanovllm.core.step import CacheGroup
from nanovllm.ops import platform
from nanovllm.ops.batch import AttentionSpec

logger = logging.getLogger(__name__)

# What is not measured: the CUDA context (half a GiB), gaps, and kernels that are loaded later.
SPARE_GPU_BYTES = 768 * 2**20
SMALLER_STEP = (
    "Raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, set "
    "enforce_eager=True, or use a smaller model"
)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that have a block table in common.

    Attributes:
        spec: of the attention of all of them.
        layers: their indices in the model.
    """

    spec: AttentionSpec
    layers: tuple[int, ...]

    @property
    def elements_per_token(self) -> int:
        """Elements of keys and values."""
        return 2 * len(self.layers) * self.spec.num_kv_heads * self.spec.head_dim

    def num_blocks(self, num_tokens: int, block_size: int, step_tokens: int) -> int:
        """Blocks that a sequence holds at most. A windowed one gives those before its window back,
        and holds what a step adds.

        Args:
            step_tokens: query tokens of the largest step.
        """
        num_blocks = -(-num_tokens // block_size)
        if self.spec.window is None:
            return num_blocks
        return min(num_blocks, -(-(self.spec.window + step_tokens) // block_size) + 1)


def layer_groups(specs: Sequence[AttentionSpec]) -> list[LayerGroup]:
    """The layers of each shape of keys, values and window, in the order of their first layers."""
    groups: dict[tuple[int | None, ...], list[int]] = {}
    for i, spec in enumerate(specs):
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.window)
        groups.setdefault(shape, []).append(i)
    return [LayerGroup(specs[layers[0]], tuple(layers)) for layers in groups.values()]


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How large the cache is, group by group, and how long sequences may be."""

    groups: tuple[CacheGroup, ...]
    max_model_len: int

    @property
    def block_size(self) -> int:
        """Tokens per block, of all groups."""
        return self.groups[0].block_size

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)


def check_model_len(max_model_len: int | None, max_position_embeddings: int) -> None:
    """Raise ValueError for a max_model_len of the user's that the model cannot have."""
    if max_model_len is not None and not 2 <= max_model_len <= max_position_embeddings:
        raise ValueError(
            f"max_model_len={max_model_len} must be at least 2 (a prompt and a token) and at most "
            f"{max_position_embeddings}, the checkpoint's max_position_embeddings"
        )


def plan_cache(
    cache_bytes: int,
    layers: Sequence[LayerGroup],
    itemsize: int,
    block_size: int,
    max_num_seqs: int,
    step_tokens: int,
    max_model_len: int | None,
    max_position_embeddings: int,
    remedy: str = "kv_cache_memory_bytes (or num_gpu_blocks_override)",
) -> CachePlan:
    """Blocks that fit in `cache_bytes`: enough for at least one sequence of full length, and no
    more than max_num_seqs of them need. Each group holds the same number of such sequences.

    Args:
        layers: the groups of layers.
        itemsize: bytes of an element of the cache.
        step_tokens: query tokens of the largest step.
        max_model_len: the user's; None takes the checkpoint's, lowered with a warning to what fits.
        remedy: the option that makes the cache larger.

    Raises:
        ValueError: the user's max_model_len does not fit, or nothing fits.
    """

    def blocks_of(num_tokens: int) -> list[int]:
        """A sequence's blocks, in each group."""
        return [group.num_blocks(num_tokens, block_size, step_tokens) for group in layers]

    def bytes_of(num_tokens: int) -> int:
        per_block = (group.elements_per_token * itemsize * block_size for group in layers)
        return sum(n * size for n, size in zip(blocks_of(num_tokens), per_block, strict=True))

    if cache_bytes < bytes_of(2):
        raise ValueError(
            f"the KV cache of {cache_bytes} bytes does not hold "
            f"{'one block' if block_size > 1 else 'two blocks'} of {block_size} tokens "
            f"({bytes_of(block_size)} bytes); raise {remedy} or lower block_size"
        )
    wanted = max_model_len or max_position_embeddings
    largest = bisect_right(range(wanted + 1), cache_bytes, key=bytes_of) - 1
    if wanted > largest and max_model_len is not None:
        raise ValueError(
            f"max_model_len={max_model_len} does not fit in the KV cache of {cache_bytes} bytes: "
            f"{bytes_of(wanted) - cache_bytes} more are needed; the largest that fits is "
            f"{largest}: lower it or raise {remedy}"
        )
    if wanted > largest:
        logger.warning(
            "max_model_len is lowered from the checkpoint's %d to %d, what the KV cache of %d "
            "bytes holds; change that by %s",
            wanted,
            largest,
            cache_bytes,
            remedy,
        )
    fitted = min(wanted, largest)
    groups = []
    for group, num_blocks in zip(layers, blocks_of(fitted), strict=True):
        share = cache_bytes * num_blocks // bytes_of(fitted)
        num_blocks = min(share, max_num_seqs * num_blocks)
        groups.append(CacheGroup(num_blocks, block_size, group.spec.window))
    return CachePlan(tuple(groups), fitted)


class GPUMemory:
    """What this engine may hold of a GPU's memory, and what it does.

    Args:
        device: a GPU.
        share: of the card's total; less, with a warning, if less is free now.
    """

    def __init__(self, device: torch.device, share: float):
        self.device = device
        self.free_before, total = platform.free_memory(device)
        self.budget = int(share * total)
        if self.budget > self.free_before:
            logger.warning(
                "gpu_memory_utilization=%s is %.2f GiB, but other processes leave only %.2f GiB of "
                "the GPU's %.2f free: the engine takes those",
                share,
                *(n / platform.GIB for n in (self.budget, self.free_before, total)),
            )
            self.budget = self.free_before

    def used(self) -> int:
        """Bytes taken since the engine began, by torch and beside it."""
        return self.free_before - platform.free_memory(self.device)[0]

    def left_for_cache(
        self, weight_bytes: int, lasting: int, step_bytes: int, graph_bytes: int
    ) -> int:
        """What the budget leaves, in bytes.

        Args:
            weight_bytes: of the parameters, for the log.
            lasting: taken by weights, buffers, kernels and libraries.
            step_bytes: what the largest step takes beside that, for as long as it runs.
            graph_bytes: what the CUDA graphs take.

        Raises:
            ValueError: nothing is left.
        """
        parts = (self.budget, weight_bytes, lasting - weight_bytes, step_bytes, graph_bytes)
        logger.info(
            "of %.2f GiB: weights %.2f, buffers and kernels %.2f, the largest step %.2f, CUDA "
            "graphs %.2f",
            *(part / platform.GIB for part in parts),
        )
        needed = lasting + step_bytes + graph_bytes + SPARE_GPU_BYTES
        if needed >= self.budget:
            raise ValueError(
                f"GPU memory is too small by {(needed - self.budget) / platform.GIB:.2f} GiB and "
                f"the KV cache: weights, the largest step and CUDA graphs take "
                f"{needed / platform.GIB:.2f} GiB of the {self.budget / platform.GIB:.2f} GiB that "
                f"this engine may hold. {SMALLER_STEP}"
            )
        return self.budget - needed


def check_memory(memory: GPUMemory | None, weight_bytes: int, cache_bytes: int) -> None:
    """Raise ValueError if weights and cache are more than may be used of a GPU, or is available on
    a CPU, for which there is no GPUMemory."""
    available = memory.budget if memory else platform.available_memory()
    needed = weight_bytes + cache_bytes
    if available is not None and needed > available:
        share = "may be used; raise gpu_memory_utilization, " if memory else "is available; "
        raise ValueError(
            f"memory is too small: {weight_bytes / platform.GIB:.2f} GiB of weights and "
            f"{cache_bytes / platform.GIB:.2f} GiB of KV cache, but only "
            f"{available / platform.GIB:.2f} GiB {share}lower kv_cache_memory_bytes (or "
            f"num_gpu_blocks_override) or max_model_len, or use a smaller dtype or model"
        )
