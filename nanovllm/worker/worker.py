"""The worker: loads the model, sizes the KV cache, sleeps and wakes up.

executor.py makes one. What it has made ready, model_runner.py runs steps on.
"""

import gc
import logging
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TYPE_CHECKING

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
from nanovllm.ops.batch import Attention, KVCache
from nanovllm.worker import trial
from nanovllm.worker.cache_plan import (
    SMALLER_STEP,
    CachePlan,
    GPUMemory,
    check_memory,
    check_model_len,
    plan_cache,
)
from nanovllm.worker.graphs import graph_sizes
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.runner import ModelRunner
from nanovllm.worker.sampler import Sampler
from nanovllm.worker.upload import Uploader

if TYPE_CHECKING:
    from nanovllm.ops.triton.compile_ahead import KernelCompiler

logger = logging.getLogger(__name__)

PARTS = ("weights", "kv_cache")  # vLLM's tags of what sleeps


class Worker:
    """Model, cache and row state on one device.

    Args:
        config: the user's options.
        model_config: the checkpoint's architecture.
        device: where to compute.
        max_num_seqs: rows.
        max_num_batched_tokens: query tokens of the largest step.

    Attributes:
        plan: how large the cache is.
        sleeping: which of PARTS have no memory.
        model: with its weights; None: they have no memory.
        cache: the KV cache and the rows' inputs; None: they have no memory.
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
    ):
        self.config, self.model_config = config, model_config
        self.device = device
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.dtype = platform.resolve_dtype(config.dtype, model_config.dtype, device)
        check_model_len(config.max_model_len, model_config.max_position_embeddings)
        laps = Laps()
        if self.is_gpu:  # while the driver starts
            self.compiler = ThreadPoolExecutor(1).submit(_make_compiler, device)
        self.memory = GPUMemory(device, config.gpu_memory_utilization) if self.is_gpu else None
        # A model without memory is cheap; this one is only asked how large its weights are.
        self.weight_bytes = weight_bytes(build_model(model_config, 1, self.dtype), device)
        check_memory(self.memory, self.weight_bytes, cache_bytes=0)
        self.block_size = config.block_size or ops.default_block_size(config.attention_backend)
        self.attention = self._make_attention()
        self.uploader = Uploader(device)
        self.sampler = Sampler(max_num_seqs + 1, model_config.vocab_size, self.uploader)
        self.sleeping: set[str] = set()
        self.model: CausalLM | None = None
        self.cache: tuple[KVCache, InputBuilder] | None = None
        self.runner: ModelRunner | None = None

        # On a GPU nobody knows before trying what a step needs beside weights and cache.
        self.max_positions = config.max_model_len or model_config.max_position_embeddings
        cache_bytes = self._wanted_cache_bytes()
        if cache_bytes is not None:
            self.plan = self._plan_cache(cache_bytes)
            check_memory(self.memory, self.weight_bytes, self.plan.num_tokens * self.token_bytes)
            self.max_positions = self.plan.max_model_len
        laps.end("device")
        model = self._allocated_model()
        laps.end("model")
        try:
            self._start(model, laps)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"GPU memory is too small to try the largest step: {error}. {SMALLER_STEP}, or "
                f"lower kv_cache_memory_bytes (or num_gpu_blocks_override)"
            ) from None
        if self.is_gpu:  # a CPU's start is its weights
            logger.info("the worker's start: %s", laps)

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def graph_sizes(self) -> list[int]:
        """Of the CUDA graphs, in tokens, ascending; none: steps run without."""
        if not self.is_gpu or self.config.enforce_eager:
            return []
        return graph_sizes(
            self.max_num_seqs, self.attention.least_mixed, self.max_num_batched_tokens
        )

    @property
    def mixed_tokens(self) -> int | None:
        """As the engine's."""
        sizes, least = self.graph_sizes, self.attention.least_mixed
        if not sizes:
            return None
        return 0 if least is None or sizes[-1] < least else sizes[-1]

    @property
    def token_bytes(self) -> int:
        """Of a token in the cache."""
        return self.model_config.kv_elements_per_token * self.dtype.itemsize

    @property
    def description(self) -> str:
        """Device, dtype, attention backend and weights, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        gib = self.weight_bytes / platform.GIB
        captured = self.runner.graphs if self.runner else None
        graphs = f", {len(captured.sizes)} CUDA graphs" if captured else ""
        return (
            f"{self.device} in {dtype}, attention {self.attention.name}{graphs}, "
            f"weights {gib:.2f} GiB"
        )

    # Sleep

    def sleep(self, level: int) -> None:
        """Give back the memory of weights and cache. At level 1 a GPU's weights go to the CPU's
        memory; all else that was in it is gone. No step is in flight, none follows before
        wake_up."""
        self.runner = self.cache = None
        if level == 2:
            self.model = None
        elif self.model is not None and self.is_gpu:
            self.model.to("cpu")
        self.sleeping = set(PARTS)
        platform.release_memory(self.device)

    def wake_up(self, tags: Collection[str]) -> None:
        """Undo it for some of PARTS; after an error all of them sleep."""
        woken = self.sleeping.intersection(tags)
        if not woken:
            return
        try:
            if "weights" in woken:
                if self.model is None:
                    self.model = self._load(self._allocated_model())
                else:
                    self.model.to(self.device)
            if "kv_cache" in woken:
                self.cache = self._make_cache(self.plan.num_blocks, self.plan.max_blocks)
            if woken == self.sleeping:
                assert self.model is not None and self.cache is not None
                self.sampler.forget_rows()
                self.runner = ModelRunner(self.model, *self.cache, self.sampler)
                if self.graph_sizes:
                    self.runner.use_graphs(self.graph_sizes)
        except BaseException:
            self.sleep(level=1)
            raise
        self.sleeping -= woken

    # Construction

    def _start(self, model: CausalLM, laps: Laps) -> None:
        """Weights, cache and, on a GPU, all that the first step would wait for."""
        measures = self._wanted_cache_bytes() is None
        with self._compiled_ahead(model, laps):
            self.model = self._load(model)
            laps.end("weights")
        if measures:
            self.plan = self._plan_cache(self._measured_cache_bytes(model))
        self.cache = self._make_cache(self.plan.num_blocks, self.plan.max_blocks)
        self.runner = ModelRunner(model, *self.cache, self.sampler)
        if self.is_gpu:
            sizes = (self.max_num_seqs, self.max_num_batched_tokens, self.plan.max_model_len)
            self.runner.run(trial.largest_step(*sizes))
        self.sampler.forget_rows()  # those of the steps that were tried
        laps.end("cache")
        if self.graph_sizes:
            self.runner.use_graphs(self.graph_sizes)
            laps.end("CUDA graphs")

    def _allocated_model(self) -> CausalLM:
        model = build_model(self.model_config, self.max_positions, self.dtype)
        allocate(model, self.device)
        return model

    def _load(self, model: CausalLM) -> CausalLM:
        if self.config.load_format == "dummy":
            fill_dummy_weights(model, self.config.seed)
        else:
            folder = resolve_folder(self.config, with_weights=True)
            load_checkpoint(model, folder)
        prepare_weights(model)
        return model

    def _make_attention(self) -> Attention:
        return ops.make_attention(
            self.config.attention_backend,
            self.model_config,
            self.block_size,
            self.dtype,
            self.device,
            self.max_num_seqs,
        )

    def _make_cache(self, num_blocks: int, max_blocks: int) -> tuple[KVCache, InputBuilder]:
        config = self.model_config
        pages = (num_blocks, self.block_size, config.num_kv_heads, config.head_dim)
        # Not zeros: writing them would take all the memory now, instead of page by page when used.
        shape = (config.num_layers, 2, *pages)
        kv = KVCache(torch.empty(shape, dtype=self.dtype, device=self.device))
        inputs = InputBuilder(
            self.max_num_seqs,
            (self.graph_sizes or [self.max_num_seqs])[-1],
            max_blocks,
            self.block_size,
            self.attention,
            self.uploader,
            self.sampler.device_state,
        )
        return kv, inputs

    def _make_trial_cache(self) -> tuple[KVCache, InputBuilder]:
        """One page."""
        return self._make_cache(1, -(-self.max_positions // self.block_size))

    @contextmanager
    def _compiled_ahead(self, model: CausalLM, laps: Laps) -> Iterator[None]:
        """On a GPU, threads compile the kernels while what is within it runs; then they are
        there."""
        if not self.is_gpu:
            yield
            return
        compiler = self.compiler.result()
        try:
            kv, inputs = self._make_trial_cache()
            runner = ModelRunner(model, kv.first_layer, inputs, self.sampler)
            sizes = (self.max_num_batched_tokens, self.max_positions)
            compiling = trial.compile_kernels(compiler, runner, *sizes, self.graph_sizes)
            del kv, inputs, runner
            # Kernels that were there already have run, others not: it is in no state to go on.
            self.attention = self._make_attention()
            laps.end("trial without kernels")
            yield
            # A full collection takes a tenth of a second, in which a GPU runs out of work: now, not
            # in one of the first batches.
            gc.collect()
            wait(compiling)
            laps.end(f"{len(compiling)} kernels")
        except BaseException:
            compiler.close(cancel=True)
            raise
        compiler.close(cancel=False)

    # How large the cache is

    def _wanted_cache_bytes(self) -> int | None:
        """The cache's size by the user's word, or a CPU's default; None: what a GPU has left."""
        config = self.config
        if config.num_gpu_blocks_override:
            return config.num_gpu_blocks_override * self.block_size * self.token_bytes
        if config.kv_cache_memory_bytes or self.is_gpu:
            return config.kv_cache_memory_bytes
        return platform.default_kv_cache_bytes(self.weight_bytes)

    def _measured_cache_bytes(self, model: CausalLM) -> int:
        """What the budget leaves for the cache when the largest step has been run, and graphs have
        been captured, on a cache of one page."""
        assert self.memory is not None
        runner = ModelRunner(model, *self._make_trial_cache(), self.sampler)
        sizes = (self.max_num_batched_tokens, self.max_positions)
        taken = trial.measured_bytes(runner, self.memory, *sizes, self.graph_sizes)
        return self.memory.left_for_cache(self.weight_bytes, *taken)

    def _plan_cache(self, cache_bytes: int) -> CachePlan:
        by_share = self.is_gpu and self._wanted_cache_bytes() is None
        return plan_cache(
            cache_bytes,
            self.token_bytes,
            self.block_size,
            self.max_num_seqs,
            self.config.max_model_len,
            self.model_config.max_position_embeddings,
            **({"remedy": "gpu_memory_utilization"} if by_share else {}),
        )


def _make_compiler(device: torch.device) -> "KernelCompiler":
    from nanovllm.ops.triton.compile_ahead import KernelCompiler

    return KernelCompiler(device)
