"""The worker: load the model, measure what a step takes, allocate the KV cache, capture CUDA
graphs; sleep and wake up.

executor.py makes one. runner.py runs steps on what it has made ready.
"""

import logging
from collections.abc import Collection

import torch

from nanovllm import ops
from nanovllm.config import EngineConfig
from nanovllm.core.metrics import Laps
from nanovllm.core.model_config import ModelConfig
from nanovllm.models.checkpoint import resolve_folder
from nanovllm.models.frame import CausalLM
from nanovllm.models.loader import (
    allocate,
    build_model,
    fill_dummy_weights,
    load_checkpoint,
    prepare_weights,
    weight_bytes,
)
from nanovllm.ops import platform
from nanovllm.ops.batch import KVCache
from nanovllm.worker.cache_plan import (
    SMALLER_STEP,
    CachePlan,
    GPUMemory,
    check_memory,
    check_model_len,
    layer_groups,
    plan_cache,
)
from nanovllm.worker.compile_ahead import compiled_ahead, start_compiler
from nanovllm.worker.graphs import graph_sizes, least_mixed_of
from nanovllm.worker.runner import ModelRunner
from nanovllm.worker.trial import largest_step, measured_bytes

logger = logging.getLogger(__name__)

PARTS = ("weights", "kv_cache")  # vLLM's tags of what sleeps


class Worker:
    """Model, cache and rows on one device.

    Args:
        config: the user's options.
        model_config: the checkpoint's architecture.
        device: where to compute.
        max_num_seqs: rows.
        max_num_batched_tokens: query tokens of the largest step.
        limited: whether requests will have top_k, top_p or min_p if they name no parameters: CUDA
            graphs of such steps are then captured at the start.

    Attributes:
        plan: how large the cache is.
        attentions: the backend of each group of layers.
        graph_sizes: of the CUDA graphs, in tokens, ascending; empty: steps run without.
        mixed_tokens: tokens of the largest graph that may hold chunks; 0: no graph may.
        mixed_keys: keys that its chunks may read, as in ops.batch.Attention.
        sleeping: which of PARTS have no memory.
        model, kv: None: weights or cache have no memory.
        runner: of model and cache; None: one of them has no memory.

    Raises:
        ValueError: options, memory and checkpoint do not go together; before weights are read where
        it can be known.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        device: torch.device,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        limited: bool = False,
    ):
        self.config, self.model_config, self.device = config, model_config, device
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.limited, self.is_gpu = limited, device.type == "cuda"
        self.dtype = platform.resolve_dtype(config.dtype, model_config.dtype, device)
        check_model_len(config.max_model_len, model_config.max_position_embeddings)
        laps = Laps()
        compiler = start_compiler(device)  # while the driver starts
        self.memory = GPUMemory(device, config.gpu_memory_utilization) if self.is_gpu else None
        # A model without memory is cheap; this one only says how large its weights are.
        sketch = build_model(model_config, 1, self.dtype)
        self.weight_bytes = weight_bytes(sketch, device)
        self.layers = layer_groups(sketch.attention_specs)
        check_memory(self.memory, self.weight_bytes, cache_bytes=0)
        self.block_size = config.block_size or ops.default_block_size(config.attention_backend)
        self.attentions = tuple(
            ops.make_attention(
                config.attention_backend, group.spec, self.block_size, self.dtype, device,
                max_num_seqs,
            )
            for group in self.layers
        )  # fmt: skip
        self.graph_sizes: list[int] = []
        self.mixed_tokens = 0
        self.mixed_keys = min(attention.mixed_keys for attention in self.attentions)
        in_graphs = all(attention.in_graphs for attention in self.attentions)
        if self.is_gpu and in_graphs and not config.enforce_eager:
            least_mixed = least_mixed_of(self.attentions)
            self.graph_sizes = graph_sizes(max_num_seqs, least_mixed, max_num_batched_tokens)
            if least_mixed is not None and self.graph_sizes[-1] >= least_mixed:
                self.mixed_tokens = self.graph_sizes[-1]
        self.sleeping: set[str] = set()
        self.runner: ModelRunner | None = None

        # What a step on a GPU needs beside weights and cache is known when it has been tried.
        self.max_positions = config.max_model_len or model_config.max_position_embeddings
        cache_bytes = self._wanted_cache_bytes()
        if cache_bytes is not None:
            self.plan = self._plan_cache(cache_bytes)
            num_elements = sum(
                cache.num_blocks * self.block_size * group.elements_per_token
                for cache, group in zip(self.plan.groups, self.layers, strict=True)
            )
            check_memory(self.memory, self.weight_bytes, num_elements * self.dtype.itemsize)
            self.max_positions = self.plan.max_model_len
        laps.end("device")
        self.model: CausalLM | None = self._allocated_model()
        self.kv: KVCache | None = None
        try:
            sizes = self.max_positions, self.graph_sizes
            with compiled_ahead(compiler, self._trial_runner, *sizes, laps):
                self._load(self.model)
            laps.end("weights")
            if cache_bytes is None:
                self.plan = self._plan_cache(self._measure())
            self._allocate()
            laps.end("cache")
            self._capture()
            laps.end("CUDA graphs")
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"GPU memory is too small to try the largest step: {error}. {SMALLER_STEP}, or "
                f"lower kv_cache_memory_bytes (or num_gpu_blocks_override)"
            ) from None
        if self.is_gpu:  # a CPU's start is its weights
            logger.info("the worker's start: %s", laps)

    @property
    def token_bytes(self) -> int:
        """Of a token in the cache."""
        elements = sum(group.elements_per_token for group in self.layers)
        return elements * self.dtype.itemsize

    @property
    def description(self) -> str:
        """Device, dtype, attention backend, weights and cache, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        gib = self.weight_bytes / platform.GIB
        graphs = f", {len(self.graph_sizes)} CUDA graphs" if self.graph_sizes else ""
        plan, group = self.plan, self.plan.groups[0]
        sizes = plan.max_model_len, self.block_size, self.max_num_batched_tokens
        num_seqs = group.num_blocks / self.layers[0].num_blocks(*sizes)
        return (
            f"{self.device} in {dtype}, attention {self.attentions[0].name}{graphs}, "
            f"weights {gib:.2f} GiB; KV cache of {group.num_blocks * group.block_size} tokens in "
            f"blocks of {group.block_size}, {num_seqs:.1f} requests of {plan.max_model_len} tokens"
        )

    # Load, measure, allocate, capture

    def _allocated_model(self) -> CausalLM:
        """The model with memory for its weights."""
        model = build_model(self.model_config, self.max_positions, self.dtype)
        allocate(model, self.device)
        return model

    def _load(self, model: CausalLM) -> None:
        """Read the weights."""
        if self.config.load_format == "dummy":
            fill_dummy_weights(model, self.config.seed)
        else:
            load_checkpoint(model, resolve_folder(self.config, with_weights=True))
        prepare_weights(model)

    def _measure(self) -> int:
        """Try the largest step, and CUDA graphs, on a cache of one block. Returns the bytes that
        the GPU's share has left for the cache."""
        assert self.memory is not None
        taken = measured_bytes(
            self._trial_runner(),
            self.memory,
            self.max_num_batched_tokens,
            self.max_positions,
            self.graph_sizes,
            self.limited,
        )
        return self.memory.left_for_cache(self.weight_bytes, *taken)

    def _allocate(self) -> None:
        """Give the cache its memory."""
        self.kv = self._make_cache([group.num_blocks for group in self.plan.groups])

    def _capture(self) -> None:
        """Make the runner, and have a GPU run all that the first step would wait for."""
        assert self.kv is not None
        self.runner = self._make_runner(self.kv, self.plan.max_blocks)
        if self.is_gpu:
            sizes = self.max_num_seqs, self.max_num_batched_tokens, self.plan.max_model_len
            self.runner.run(largest_step(*sizes, len(self.layers)))
        if self.graph_sizes:
            self.runner.graphs = self.runner.capture(self.graph_sizes, self.limited)

    def _make_cache(self, num_blocks: list[int]) -> KVCache:
        data = []
        group_of = [0] * self.model_config.num_layers
        for number, (group, blocks) in enumerate(zip(self.layers, num_blocks, strict=True)):
            spec = group.spec
            shape = (len(group.layers), 2, blocks, self.block_size)
            # Not zeros: writing them would take all the memory now, instead of block by block.
            data.append(
                torch.empty(
                    *shape, spec.num_kv_heads, spec.head_dim, dtype=self.dtype, device=self.device
                )
            )
            for layer in group.layers:
                group_of[layer] = number
        return KVCache(data, group_of)

    def _make_runner(self, kv: KVCache, max_blocks: int) -> ModelRunner:
        assert self.model is not None
        sizes = self.max_num_seqs, self.max_num_batched_tokens, max_blocks
        return ModelRunner(self.model, kv, self.attentions, *sizes, self.model_config.vocab_size)

    def _trial_runner(self) -> ModelRunner:
        """On a cache of one block."""
        kv = self._make_cache([1] * len(self.layers))
        return self._make_runner(kv, -(-self.max_positions // self.block_size))

    # How large the cache is

    def _wanted_cache_bytes(self) -> int | None:
        """The cache's size by the user's word, or a CPU's default; None: what a GPU has left."""
        config = self.config
        if config.num_gpu_blocks_override:
            return config.num_gpu_blocks_override * self.block_size * self.token_bytes
        if config.kv_cache_memory_bytes or self.is_gpu:
            return config.kv_cache_memory_bytes
        return platform.default_kv_cache_bytes(self.weight_bytes)

    def _plan_cache(self, cache_bytes: int) -> CachePlan:
        by_share = self.is_gpu and self._wanted_cache_bytes() is None
        return plan_cache(
            cache_bytes,
            self.layers,
            self.dtype.itemsize,
            self.block_size,
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.config.max_model_len,
            self.model_config.max_position_embeddings,
            **({"remedy": "gpu_memory_utilization"} if by_share else {}),
        )

    # Sleep

    def sleep(self, level: int) -> None:
        """Give back the memory of weights, cache and rows. At level 1 a GPU's weights go to the
        CPU's memory; all else that was in it is gone. No step is in flight, none follows before
        wake_up."""
        self.runner = self.kv = None
        if level == 2:
            self.model = None
        elif self.model is not None and self.is_gpu:
            self.model.to("cpu")
        self.sleeping = set(PARTS)
        platform.release_memory(self.device)

    def wake_up(self, tags: Collection[str]) -> None:
        """End the sleep of some of PARTS; after an error all of them sleep."""
        woken = self.sleeping.intersection(tags)
        try:
            if "weights" in woken and self.model is None:
                model = self._allocated_model()
                self._load(model)
                self.model = model
            elif "weights" in woken and self.model is not None:
                self.model.to(self.device)
            if "kv_cache" in woken:
                self._allocate()
            if woken and woken == self.sleeping:
                self._capture()
        except BaseException:
            self.sleep(level=1)
            raise
        self.sleeping -= woken
