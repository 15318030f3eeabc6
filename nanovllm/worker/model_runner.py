"""The worker: loads the model, sizes the KV cache, runs steps.

executor.py makes one and hands it StepInputs; inputs.py and sampler.py hold the rows' state.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch

from nanovllm import platform
from nanovllm.batch import KVCache
from nanovllm.checkpoint import resolve_folder
from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.models.weights import (
    build_model,
    fill_dummy_weights,
    load_weights,
    pack_weights,
    weight_bytes,
)
from nanovllm.step import StepInput
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.sampler import Sampler

logger = logging.getLogger(__name__)

DEFAULT_BLOCK_SIZE = 16


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
) -> CachePlan:
    """Pages that fit in `cache_bytes`, no more than max_num_seqs requests of full length need, and
    at least one request's.

    Args:
        max_model_len: the user's; None takes the checkpoint's, lowered with a warning to what fits.

    Raises:
        ValueError: the user's max_model_len does not fit, or nothing fits.
    """
    fitting_blocks = cache_bytes // (bytes_per_token * block_size)
    largest = fitting_blocks * block_size
    if largest < 2:
        raise ValueError(
            f"the KV cache of {cache_bytes} bytes does not hold "
            f"{'one page' if block_size > 1 else 'two pages'} of {block_size} tokens "
            f"({bytes_per_token * block_size} bytes); raise kv_cache_memory_bytes (or "
            f"num_gpu_blocks_override) or lower block_size"
        )
    wanted = max_model_len or max_position_embeddings
    if wanted > largest and max_model_len is not None:
        raise ValueError(
            f"max_model_len={max_model_len} does not fit in the KV cache of {cache_bytes} bytes; "
            f"the largest that fits is {largest}: lower it or raise kv_cache_memory_bytes (or "
            f"num_gpu_blocks_override)"
        )
    if wanted > largest:
        logger.warning(
            "max_model_len is lowered from the checkpoint's %d to %d, what the KV cache of %d "
            "bytes holds; kv_cache_memory_bytes changes its size (or num_gpu_blocks_override)",
            wanted,
            largest,
            cache_bytes,
        )
    fitted = min(wanted, largest)
    blocks_per_seq = -(-fitted // block_size)
    return CachePlan(min(fitting_blocks, max_num_seqs * blocks_per_seq), block_size, fitted)


class ModelRunner:
    """Model, cache and row state on one device.

    Args:
        config: the user's options.
        model_config: the checkpoint's architecture.
        max_num_seqs: rows.

    Raises:
        ValueError: options, memory and checkpoint do not go together; before weights are read where
        it can be known.
    """

    def __init__(self, config: EngineConfig, model_config: ModelConfig, max_num_seqs: int):
        self.device = platform.resolve_device(config.device)
        self.dtype = platform.resolve_dtype(config.dtype, model_config.dtype)
        longest = model_config.max_position_embeddings
        check_model_len(config.max_model_len, longest)
        # A model without memory is cheap; this one is only asked how large its weights are.
        self.weight_bytes = weight_bytes(build_model(model_config, 1, self.dtype), self.device)
        self._check_memory(cache_bytes=0)
        bytes_per_token = model_config.kv_elements_per_token * self.dtype.itemsize
        block_size = config.block_size or DEFAULT_BLOCK_SIZE
        self.plan = plan_cache(
            (config.num_gpu_blocks_override or 0) * block_size * bytes_per_token
            or config.kv_cache_memory_bytes
            or platform.default_kv_cache_bytes(self.weight_bytes),
            bytes_per_token,
            block_size,
            max_num_seqs,
            config.max_model_len,
            longest,
        )
        self._check_memory(self.plan.num_tokens * bytes_per_token)
        self.model = build_model(model_config, self.plan.max_model_len, self.dtype)
        if config.load_format == "dummy":
            fill_dummy_weights(self.model, self.device, config.seed)
        else:
            folder = resolve_folder(config.model, config.revision, with_weights=True)
            load_weights(self.model, folder, self.device)
        pack_weights(self.model)
        self.kv = self._allocate_cache(model_config)
        self.inputs = InputBuilder(
            max_num_seqs, self.plan.max_blocks, self.plan.block_size, self.device
        )
        self.sampler = Sampler(max_num_seqs, model_config.vocab_size, self.device)

    @property
    def description(self) -> str:
        """Device, dtype, attention backend and weights, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        gib = self.weight_bytes / platform.GIB
        return f"{self.device} in {dtype}, attention TORCH_SDPA, weights {gib:.2f} GiB"

    @torch.inference_mode()
    def run(self, step: StepInput) -> torch.Tensor:
        """One step: forward and sampling. Returns the sampled tokens, [sampled sequences] int64."""
        for start in step.starts:
            self.sampler.start_row(start)
        batch = self.inputs.build(step)
        hidden = self.model(batch, self.kv)  # [T, hidden]
        if not any(step.samples):
            return torch.empty(0, dtype=torch.int64)
        logits = self.model.logits(hidden[batch.logits_indices])  # [sampled, vocab]
        samples = np.array(step.samples)
        rows = np.array(step.rows)[samples]
        positions = (np.array(step.positions) + np.array(step.query_lens))[samples]
        token_ids = self.sampler.sample(logits, rows, positions)
        self.inputs.keep_sampled(rows, token_ids)
        return token_ids

    def _allocate_cache(self, config: ModelConfig) -> KVCache:
        pages = (self.plan.num_blocks, self.plan.block_size, config.num_kv_heads, config.head_dim)
        # Not zeros: writing them would take all the memory now, instead of page by page when used.
        shape = (config.num_layers, 2, *pages)
        return KVCache(torch.empty(shape, dtype=self.dtype, device=self.device))

    def _check_memory(self, cache_bytes: int) -> None:
        available = platform.available_memory()
        needed = self.weight_bytes + cache_bytes
        if available is not None and needed > available:
            raise ValueError(
                f"memory is too small: {self.weight_bytes / platform.GIB:.2f} GiB of weights and "
                f"{cache_bytes / platform.GIB:.2f} GiB of KV cache, but only "
                f"{available / platform.GIB:.2f} GiB is available; lower kv_cache_memory_bytes (or "
                f"num_gpu_blocks_override) or max_model_len, or use a smaller dtype or model"
            )
