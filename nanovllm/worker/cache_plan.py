"""How large the KV cache is: what the user says, what fits, what a GPU has left.

worker.py asks before it loads weights, or after it has tried the largest step.
"""

import logging
from dataclasses import dataclass

import torch

from nanovllm.ops import platform

logger = logging.getLogger(__name__)

# What is not measured: the CUDA context (half a GiB), gaps, and kernels that are loaded later.
SPARE_GPU_BYTES = 768 * 2**20
SMALLER_STEP = (
    "Raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, set "
    "enforce_eager=True, or use a smaller model"
)


@dataclass(frozen=True, slots=True)
class CachePlan:
    """How large the cache is: `num_blocks` pages of `block_size` tokens, sequences of up to
    `max_model_len` tokens."""

    num_blocks: int
    block_size: int
    max_model_len: int

    @property
    def num_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def max_blocks(self) -> int:
        """Pages of the longest sequence."""
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
    bytes_per_token: int,
    block_size: int,
    max_num_seqs: int,
    max_model_len: int | None,
    max_position_embeddings: int,
    remedy: str = "kv_cache_memory_bytes (or num_gpu_blocks_override)",
) -> CachePlan:
    """Pages that fit in `cache_bytes`, no more than max_num_seqs requests of full length need, and
    at least one request's.

    Args:
        max_model_len: the user's; None takes the checkpoint's, lowered with a warning to what fits.
        remedy: the option that makes the cache larger.

    Raises:
        ValueError: the user's max_model_len does not fit, or nothing fits.
    """
    fitting_blocks = cache_bytes // (bytes_per_token * block_size)
    largest = fitting_blocks * block_size
    if largest < 2:
        raise ValueError(
            f"the KV cache of {cache_bytes} bytes does not hold "
            f"{'one page' if block_size > 1 else 'two pages'} of {block_size} tokens "
            f"({bytes_per_token * block_size} bytes); raise {remedy} or lower block_size"
        )
    wanted = max_model_len or max_position_embeddings
    if wanted > largest and max_model_len is not None:
        raise ValueError(
            f"max_model_len={max_model_len} does not fit in the KV cache of {cache_bytes} bytes: "
            f"{(wanted - largest) * bytes_per_token} more are needed; the largest that fits is "
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
    blocks_per_seq = -(-fitted // block_size)
    return CachePlan(min(fitting_blocks, max_num_seqs * blocks_per_seq), block_size, fitted)


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
                "gpu_memory_utilization=%s asks for %.2f GiB, but others leave only %.2f GiB of "
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
