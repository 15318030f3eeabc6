"""The worker: loads the model, sizes the KV cache, runs steps.

executor.py makes one and hands it StepInputs; inputs.py and sampler.py hold the rows' state.
"""

import logging
from collections.abc import Collection, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from importlib import import_module
from threading import Thread
from typing import NamedTuple

import numpy as np
import torch

from nanovllm import ops, platform
from nanovllm.batch import Attention, KVCache
from nanovllm.checkpoint import resolve_folder
from nanovllm.config import EngineConfig, ModelConfig
from nanovllm.metrics import Laps
from nanovllm.models.weights import (
    allocate,
    build_model,
    fill_dummy_weights,
    load_weights,
    pack_weights,
    weight_bytes,
)
from nanovllm.sampling_params import MAX_LOGPROBS, SamplingParams
from nanovllm.step import Chunk, RowStart, StepInput, StepLogprobs
from nanovllm.worker.cache_plan import (
    SMALLER_STEP,
    CachePlan,
    GPUMemory,
    check_model_len,
    plan_cache,
)
from nanovllm.worker.cuda_graph import DecodeGraphs, DecodeOutput, graph_sizes
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.sampler import Sampler
from nanovllm.worker.upload import Uploader

logger = logging.getLogger(__name__)

PARTS = ("weights", "kv_cache")  # vLLM's tags of what sleeps


class Sampled(NamedTuple):
    """What a step gives, in memory that the device writes to; it stays there for some steps.

    Attributes:
        token_ids: [sampled sequences] int64.
        logprobs: theirs.
        scores: of the step's scorings.
        errors: of the tokens that could not be drawn, by their place.
    """

    token_ids: np.ndarray
    logprobs: StepLogprobs | None
    scores: StepLogprobs | None
    errors: dict[int, Exception]


class ModelRunner:
    """Model, cache and row state on one device.

    Args:
        config: the user's options.
        model_config: the checkpoint's architecture.
        device: where to compute.
        max_num_seqs: rows.
        max_num_batched_tokens: query tokens of the largest step.

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
            Thread(target=import_module, args=("triton",)).start()
        self.memory = GPUMemory(device, config.gpu_memory_utilization) if self.is_gpu else None
        # A model without memory is cheap; this one is only asked how large its weights are.
        self.weight_bytes = weight_bytes(build_model(model_config, 1, self.dtype), device)
        self._check_memory(cache_bytes=0)
        self.block_size = config.block_size or ops.default_block_size(config.attention_backend)
        self.attention = self._make_attention()
        self.uploader = Uploader(device)
        self.sampler = Sampler(max_num_seqs + 1, model_config.vocab_size, self.uploader)
        self.graphs: DecodeGraphs | None = None
        self._make_decode_logits()
        self.sleeping: set[str] = set()  # which of PARTS have no memory
        self.has_weights = False

        # On a GPU nobody knows before trying what a step needs beside weights and cache.
        max_positions = config.max_model_len or model_config.max_position_embeddings
        cache_bytes = self._wanted_cache_bytes()
        if cache_bytes is not None:
            self.plan = self._plan_cache(cache_bytes)
            self._check_memory(self.plan.num_tokens * self._bytes_per_token)
            max_positions = self.plan.max_model_len
        laps.end("device")
        self.max_positions = max_positions
        self._allocate_weights()
        laps.end("model")
        try:
            with self._compiled_ahead(max_positions, laps):
                self._load()
                laps.end("weights")
            if cache_bytes is None:
                self.plan = self._plan_cache(self._measured_cache_bytes(max_positions))
            self.kv, self.inputs = self._make_cache(self.plan.num_blocks, self.plan.max_blocks)
            if self.is_gpu:
                self._run_largest_step(self.plan.max_model_len)
            self.sampler.forget_rows()  # those of the steps that were tried
            laps.end("cache")
            if self.uses_graphs:
                self._capture_all()
                laps.end("CUDA graphs")
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
    def uses_graphs(self) -> bool:
        return self.is_gpu and not self.config.enforce_eager

    @property
    def description(self) -> str:
        """Device, dtype, attention backend and weights, for the log."""
        dtype = str(self.dtype).removeprefix("torch.")
        gib = self.weight_bytes / platform.GIB
        graphs = f", {len(self.graphs.sizes)} CUDA graphs" if self.graphs else ""
        return (
            f"{self.device} in {dtype}, attention {self.attention.name}{graphs}, "
            f"weights {gib:.2f} GiB"
        )

    @torch.inference_mode()
    def run(self, step: StepInput) -> Sampled:
        """One step: forward and sampling."""
        self.sampler.start_rows(step.starts)
        if self.is_gpu and not step.chunks:
            return self._sampled(step.decode_rows, self._run_decodes(step))
        batch, tensors = self.inputs.build(step)
        hidden = self.model(batch, self.kv)  # [T, hidden]
        samples, logprobs, scores = step.samples, None, None
        rows = step.rows[samples]
        if samples.any():
            logits = self.model.logits(hidden[batch.logits_indices])  # [sampled, vocab]
            positions = (step.positions + step.query_lens)[samples]
            token_ids = self.sampler.sample(logits, rows, positions)
            self.inputs.keep_sampled(tensors["sampled_rows"], token_ids, tensors["turn"])
            logprobs = self.sampler.logprobs.read(logits, token_ids, rows)
        if step.scorings:
            scores = self.sampler.logprobs.score(step, hidden, self.model.logits)
        return self._sampled(rows, logprobs, scores)

    def _sampled(
        self,
        rows: np.ndarray,
        logprobs: StepLogprobs | None,
        scores: StepLogprobs | None = None,
    ) -> Sampled:
        token_ids = self.inputs.sampled(len(rows))
        return Sampled(token_ids, logprobs, scores, self.sampler.host.drawn(rows, token_ids))

    def graph_size(self, step: StepInput) -> int | None:
        """The size of the CUDA graph that the step replays; None: it runs without."""
        if self.graphs is None or step.chunks:
            return None
        return self.graphs.padded_size(step.num_decodes)

    def _run_decodes(self, step: StepInput) -> StepLogprobs | None:
        num_decodes = step.num_decodes
        size = self.graph_size(step) or num_decodes
        arrays = self.inputs.begin_decode(step, size)
        if self.graphs:
            output = self.graphs.run(size, arrays, self._decode)
        else:
            output = self._decode(size, self.uploader.upload(arrays))
        rows, positions = step.decode_rows, step.decode_positions + 1
        if self.sampler.is_plain(rows, positions):
            return None
        # Warpers, changed logits and log-probabilities: other draws in place of the first.
        logits = output.logits[:num_decodes]
        token_ids = self.sampler.sample(logits, rows, positions)
        self.inputs.keep_sampled(output.rows[:num_decodes], token_ids, output.turn)
        return self.sampler.logprobs.read(logits, token_ids, rows)

    # Sleep

    def sleep(self, level: int) -> None:
        """Give back the memory of weights and cache. At level 1 a GPU's weights go to the CPU's
        memory; all else that was in it is gone. No step is in flight, none follows before
        wake_up."""
        gone = ["kv", "inputs", "decode_logits"]
        if level == 2:
            self.has_weights = False
            gone.append("model")
        elif self.is_gpu and self.has_weights:
            self.model.to("cpu")
        for name in gone:
            vars(self).pop(name, None)
        self.graphs = None  # they hold addresses of all that
        self.sleeping = set(PARTS)
        platform.release_memory(self.device)

    def wake_up(self, tags: Collection[str]) -> None:
        """Undo it for some of PARTS; after an error all of them sleep."""
        woken = self.sleeping.intersection(tags)
        try:
            if "weights" in woken:
                self._restore_weights()
            if "kv_cache" in woken:
                self.kv, self.inputs = self._make_cache(self.plan.num_blocks, self.plan.max_blocks)
                self._make_decode_logits()
                self.sampler.forget_rows()
            if woken == self.sleeping and self.uses_graphs:
                self._capture_all()
        except BaseException:
            self.sleep(level=1 if self.has_weights else 2)
            raise
        self.sleeping -= woken

    def _restore_weights(self) -> None:
        if self.has_weights:
            self.model.to(self.device)
        else:
            self._allocate_weights()
            self._load()

    # Construction

    def _make_decode_logits(self) -> None:
        """Where all decode steps of a GPU, whatever their graph, put their logits."""
        if self.is_gpu:
            shape = (self.max_num_seqs, self.model_config.vocab_size)
            self.decode_logits = torch.empty(shape, dtype=self.dtype, device=self.device)

    def _allocate_weights(self) -> None:
        self.model = build_model(self.model_config, self.max_positions, self.dtype)
        allocate(self.model, self.device)

    def _capture_all(self) -> None:
        self.graphs = self._capture(graph_sizes(self.max_num_seqs))
        self.inputs.capture_begin(self.graphs)

    @property
    def _bytes_per_token(self) -> int:
        return self.model_config.kv_elements_per_token * self.dtype.itemsize

    def _wanted_cache_bytes(self) -> int | None:
        """The cache's size by the user's word, or a CPU's default; None: what a GPU has left."""
        config = self.config
        if config.num_gpu_blocks_override:
            return config.num_gpu_blocks_override * self.block_size * self._bytes_per_token
        if config.kv_cache_memory_bytes or self.is_gpu:
            return config.kv_cache_memory_bytes
        return platform.default_kv_cache_bytes(self.weight_bytes)

    def _plan_cache(self, cache_bytes: int) -> CachePlan:
        by_share = self.is_gpu and self._wanted_cache_bytes() is None
        return plan_cache(
            cache_bytes,
            self._bytes_per_token,
            self.block_size,
            self.max_num_seqs,
            self.config.max_model_len,
            self.model_config.max_position_embeddings,
            **({"remedy": "gpu_memory_utilization"} if by_share else {}),
        )

    def _load(self) -> None:
        if self.config.load_format == "dummy":
            fill_dummy_weights(self.model, self.config.seed)
        else:
            folder = resolve_folder(self.config, with_weights=True)
            load_weights(self.model, folder)
        pack_weights(self.model)
        self.has_weights = True

    @contextmanager
    def _compiled_ahead(self, max_model_len: int, laps: Laps) -> Iterator[None]:
        """On a GPU, threads compile the kernels while what is within it runs; then they are there.

        Which ones? Those that the first layer launches, on weights that are anything yet, in the
        largest step, in decodes of each graph's size, and in so many beside a chunk. Those of odd
        batches follow when the engine may be running already."""
        if not self.is_gpu:
            yield
            return
        from nanovllm.ops.compile_ahead import KernelCompiler
        from nanovllm.ops.kernel_configs import MAX_GEMV_ROWS

        # Copies run in the trial too: torch's own operations read the inputs.
        self.uploader.upload({"compiled": np.zeros(1, np.int64)})
        compiler = KernelCompiler(self.device)
        try:
            self.kv, self.inputs = self._make_trial_cache(max_model_len)
            self.kv = self.kv.first_layer
            with compiler.instead_of_launches() as compiling, torch.inference_mode():
                self._run_largest_step(max_model_len, num_seqs=1)  # long chunks take longest
                self._run_largest_step(max_model_len)
                for size in graph_sizes(self.max_num_seqs):
                    self._decode(size, self.uploader.upload(self._begin_decodes(1, size)))
                    if size < self.max_num_seqs:
                        self._run_mixed_step(size)
            with compiler.instead_of_launches(), torch.inference_mode():  # nobody waits for these
                # All rows' tables are zeros: a prefix that they share, if it is long enough.
                size = self.max_num_seqs
                arrays = self._begin_decodes(size, size, max_model_len - 1)
                self._decode(size, self.uploader.upload(arrays))
                for size in range(1, min(MAX_GEMV_ROWS, self.max_num_seqs) + 1):
                    self._decode(size, self.uploader.upload(self._begin_decodes(1, size)))
                one = torch.ones(1, device=self.device)
                logits, keys = self.decode_logits[:1], one.new_zeros((1, 2), dtype=torch.int64)
                ops.sample(logits, one, keys, top_p=one)
                ops.top_logprobs(logits, keys[:, 0], MAX_LOGPROBS)
            del self.kv, self.inputs
            # Kernels that were there already have run, others not: it is in no state to go on.
            self.attention = self._make_attention()
            laps.end("trial without kernels")
            yield
            wait(compiling)
            laps.end(f"{len(compiling)} kernels")
        except BaseException:
            compiler.close(cancel=True)
            raise
        compiler.close(cancel=False)

    def _make_cache(self, num_blocks: int, max_blocks: int) -> tuple[KVCache, InputBuilder]:
        config = self.model_config
        pages = (num_blocks, self.block_size, config.num_kv_heads, config.head_dim)
        # Not zeros: writing them would take all the memory now, instead of page by page when used.
        shape = (config.num_layers, 2, *pages)
        kv = KVCache(torch.empty(shape, dtype=self.dtype, device=self.device))
        inputs = InputBuilder(
            self.max_num_seqs,
            max_blocks,
            self.block_size,
            self.attention,
            self.uploader,
            self.sampler.device_state,
        )
        return kv, inputs

    def _make_attention(self) -> Attention:
        return ops.make_attention(
            self.config.attention_backend,
            self.model_config,
            self.block_size,
            self.dtype,
            self.device,
            self.max_num_seqs,
        )

    def _make_trial_cache(self, max_model_len: int) -> tuple[KVCache, InputBuilder]:
        """One page."""
        return self._make_cache(1, -(-max_model_len // self.block_size))

    @torch.inference_mode()
    def _measured_cache_bytes(self, max_model_len: int) -> int:
        """What the budget leaves for the cache when the largest step has been run, and graphs have
        been captured, on a cache of one page."""
        assert self.memory is not None
        self.kv, self.inputs = self._make_trial_cache(max_model_len)
        self._run_largest_step(max_model_len)  # loads kernels and libraries, which stay
        lasting = self.memory.used()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_reserved(self.device)
        self._run_largest_step(max_model_len)
        # Reserved, not allocated: with the gaps that the step's tensors leave between them.
        step_bytes = torch.cuda.max_memory_reserved(self.device) - before
        graph_bytes = self._measured_graph_bytes(lasting) if self.uses_graphs else 0
        del self.kv, self.inputs
        return self.memory.left_for_cache(self.weight_bytes, lasting, step_bytes, graph_bytes)

    def _measured_graph_bytes(self, lasting: int) -> int:
        """Graphs share their memory, so the largest costs most, and each of the others about what
        the second costs; and those for shared prefixes, which come later, as much again."""
        assert self.memory is not None
        *others, largest = graph_sizes(self.max_num_seqs)
        graphs = self._capture([largest])
        first = self.memory.used() - lasting
        del graphs
        if not others:
            return first
        graphs = self._capture([others[-1], largest])
        second = max(0, self.memory.used() - lasting - first)
        del graphs
        return first + (2 * len(others) + 1) * second

    def _run_largest_step(self, max_model_len: int, num_seqs: int | None = None) -> None:
        """As many tokens as a step may have, and as many rows of logits (or so many). What else may
        be asked of a row takes less memory than its layers did."""
        num_tokens = self.max_num_batched_tokens
        num_seqs = num_seqs or min(self.max_num_seqs, num_tokens)
        query_lens = [min(max_model_len, num_tokens // num_seqs)] * num_seqs
        query_lens[0] = min(max_model_len, num_tokens - sum(query_lens[1:]))
        params = SamplingParams(temperature=1.0)
        step = StepInput()
        for row, query_len in enumerate(query_lens):
            # Cached to the end: the one page there is is read, and nothing is stored.
            step.starts.append(RowStart(row, max_model_len, params, 0, (), 0))
            step.chunks.append(Chunk(row, 0, [0] * query_len, samples=True))
        self.run(step)

    def _run_mixed_step(self, num_decodes: int) -> None:
        """Decodes beside a chunk: they run other kernels than decodes alone."""
        rows = np.arange(num_decodes)
        zeros = np.zeros_like(rows)
        step = StepInput(decode_rows=rows, decode_positions=zeros, decode_pages=zeros - 1)
        params = SamplingParams(temperature=0.0)
        step.starts.append(RowStart(num_decodes, 1, params, 0, (), 0))
        step.chunks.append(Chunk(num_decodes, 0, [0], samples=True))
        self.inputs.last_tokens.zero_()  # nobody has drawn any
        self.run(step)

    @torch.inference_mode()
    def _capture(self, sizes: list[int]) -> DecodeGraphs:
        graphs = DecodeGraphs(sizes, self.uploader)
        first_layer = self.kv.first_layer
        for size in reversed(sizes):  # the largest first: the others find room in its memory
            graphs.capture(
                size,
                self._begin_decodes(1, size),
                self._decode,
                warm_up=lambda size, tensors: self._decode(size, tensors, first_layer),
            )
        return graphs

    def _begin_decodes(
        self, num_decodes: int, size: int, position: int = 0
    ) -> dict[str, np.ndarray]:
        """Decodes that nobody asked for, in a step of a graph's size: of rows that belong to
        nobody yet, or the one that never does."""
        last = self.inputs.padding_row + 1 if num_decodes == 1 else num_decodes
        rows = np.arange(last - num_decodes, last)
        step = StepInput(
            decode_rows=rows,
            decode_positions=np.full_like(rows, position),
            decode_pages=np.full_like(rows, -1),
        )
        self.inputs.last_tokens.zero_()  # nobody has drawn any
        self.inputs.steps_listed = 0  # it does not follow the step before
        return self.inputs.begin_decode(step, size)

    def _decode(
        self, size: int, attention_tensors: dict[str, torch.Tensor], kv: KVCache | None = None
    ) -> DecodeOutput:
        """A step of decodes, drawn by temperature alone, without a look at the host."""
        batch, tensors = self.inputs.decode_batch(size, attention_tensors)
        hidden = self.model(batch, kv or self.kv)
        logits = self.model.logits(hidden, out=self.decode_logits[:size])
        token_ids = ops.sample(logits, tensors["temperature"], tensors["noise_keys"])
        self.inputs.keep_sampled(tensors["rows"], token_ids, tensors["turn"])
        return DecodeOutput(logits, tensors["rows"], tensors["turn"])

    def _check_memory(self, cache_bytes: int) -> None:
        available = self.memory.budget if self.memory else platform.available_memory()
        needed = self.weight_bytes + cache_bytes
        if available is not None and needed > available:
            share = (
                "may be used; raise gpu_memory_utilization, " if self.memory else "is available; "
            )
            raise ValueError(
                f"memory is too small: {self.weight_bytes / platform.GIB:.2f} GiB of weights and "
                f"{cache_bytes / platform.GIB:.2f} GiB of KV cache, but only "
                f"{available / platform.GIB:.2f} GiB {share}lower kv_cache_memory_bytes (or "
                f"num_gpu_blocks_override) or max_model_len, or use a smaller dtype or model"
            )
