"""Runs steps: what a StepInput says through the model and the sampler.

worker.py makes one when weights and cache have memory, and executor.py hands it StepInputs;
inputs.py and sampler.py hold the rows' state.
"""

from typing import NamedTuple

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.models.frame import CausalLM
from nanovllm.ops.batch import KVCache
from nanovllm.outputs import LogprobLines
from nanovllm.worker.graphs import GraphOutput, StepGraphs
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.sampler import Sampler


class Sampled(NamedTuple):
    """What a step gives, in memory that the device writes to; it stays there for some steps.

    Attributes:
        token_ids: [n] int64, those of the sampled sequences among them.
        places: [sampled sequences], theirs in token_ids.
        logprobs: theirs.
        scores: of the step's scorings.
        errors: of the tokens that could not be drawn, by their place.
    """

    token_ids: np.ndarray
    places: np.ndarray
    logprobs: LogprobLines | None
    scores: LogprobLines | None
    errors: dict[int, Exception]


class ModelRunner:
    """A model and a cache.

    Args:
        model: with weights.
        kv: the cache; of as many layers as are to run.
        inputs, sampler: their rows' state.

    Attributes:
        graphs: of steps of few tokens; None: they run without.
        step_logits: on a GPU, where every step whose inputs are made there puts its logits, with a
            graph or without.
    """

    def __init__(self, model: CausalLM, kv: KVCache, inputs: InputBuilder, sampler: Sampler):
        self.model, self.kv, self.inputs, self.sampler = model, kv, inputs, sampler
        self.uploader = inputs.uploader
        self.graphs: StepGraphs | None = None
        device, self.max_num_seqs = kv.data.device, inputs.padding_row
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            shape = (self.max_num_seqs, sampler.vocab_size)
            self.step_logits = torch.empty(shape, dtype=kv.data.dtype, device=device)

    @torch.inference_mode()
    def run(self, step: StepInput) -> Sampled:
        """One step: forward and sampling."""
        self.sampler.start_rows(step.starts)
        size = self.graph_size(step)
        if size is not None or (self.is_gpu and not step.chunks):
            return self._run_tokens(step, size)
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
        return self._sampled(rows, np.arange(len(rows)), logprobs, scores)

    def _sampled(
        self,
        rows: np.ndarray,
        places: np.ndarray,
        logprobs: LogprobLines | None,
        scores: LogprobLines | None,
    ) -> Sampled:
        token_ids = self.inputs.sampled()
        # Rows with processors on the host are never plain, so their tokens come one after another.
        errors = self.sampler.host.drawn(rows, token_ids)
        return Sampled(token_ids, places, logprobs, scores, errors)

    def graph_size(self, step: StepInput) -> int | None:
        """The size of the CUDA graph that the step replays; None: it runs without."""
        if self.graphs is None:
            return None
        num_tokens = step.num_decodes
        if step.chunks:
            query_lens, attention = step.query_lens, self.inputs.attention
            keys = (query_lens * (step.positions + query_lens))[step.num_decodes :].sum()
            if attention.least_mixed is None or keys > attention.mixed_keys:
                return None
            num_tokens = max(attention.least_mixed, int(query_lens.sum()))
        size = self.graphs.padded_size(num_tokens)
        # Larger ones have no logits but those that are drawn from.
        return None if size is not None and size > self.max_num_seqs and step.scorings else size

    def _run_tokens(self, step: StepInput, size: int | None) -> Sampled:
        """A step whose inputs are made on the device.

        Args:
            size: of its graph; None: it runs without, and has no chunks.
        """
        if self.graphs is not None:
            assert size is not None
            output = self.graphs.run(size, self.inputs.begin(step, size), self.forward)
        else:
            size = step.num_decodes
            output = self.forward(size, self.uploader.upload(self.inputs.begin(step, size)))
        rows, places = step.decode_rows, np.arange(step.num_decodes)
        if step.chunks:
            rows = step.rows[step.samples]
            places = step.sampled_tokens if size <= self.max_num_seqs else np.arange(len(rows))
        scores = None
        if step.scorings:
            scores = self.sampler.logprobs.score(step, output.logits, lambda logits: logits)
        if self.sampler.all_plain:
            return self._sampled(rows, places, None, scores)
        drawn: slice | torch.Tensor = slice(len(rows))
        if step.chunks:
            drawn = self.uploader.upload({"places": places})["places"]
        logits, drawn_rows = output.logits[drawn], output.rows[drawn]
        positions = (step.positions + step.query_lens)[step.samples]
        if not self.sampler.is_plain(rows, positions):
            # Warpers and changed logits: other draws in place of the first.
            token_ids = self.sampler.sample(logits, rows, positions)
            self.inputs.keep_sampled(drawn_rows, token_ids, output.turn)
            places = np.arange(len(rows))
        logprobs = None
        if self.sampler.logprobs.asks[rows].any():
            last_tokens = self.inputs.last_tokens[drawn_rows]
            logprobs = self.sampler.logprobs.read(logits, last_tokens, rows)
        return self._sampled(rows, places, logprobs, scores)

    def forward(
        self, size: int, attention_tensors: dict[str, torch.Tensor], kv: KVCache | None = None
    ) -> GraphOutput:
        """A step of so many tokens, drawn by temperature alone, without a look at the host."""
        batch, tensors = self.inputs.batch_of(size, attention_tensors)
        hidden = self.model(batch, kv or self.kv)
        draws = [tensors[name] for name in ("rows", "temperature", "noise_keys")]
        if size > self.max_num_seqs:
            sampled = tensors["sampled_tokens"]
            hidden, *draws = (tensor[sampled] for tensor in (hidden, *draws))
        rows, temperature, noise_keys = draws
        logits = self.model.logits(hidden, out=self.step_logits[: len(rows)])
        token_ids = ops.sample(logits, temperature, noise_keys)
        self.inputs.keep_sampled(rows, token_ids, tensors["turn"])
        return GraphOutput(logits, rows, tensors["turn"])

    def use_graphs(self, sizes: list[int]) -> None:
        """From now on, for steps of up to the last of these many tokens."""
        self.graphs = self.capture(sizes)
        self.inputs.capture_begin(self.graphs)

    @torch.inference_mode()
    def capture(self, sizes: list[int]) -> StepGraphs:
        """Graphs of padding alone."""
        graphs = StepGraphs(sizes, self.uploader)
        first_layer = self.kv.first_layer
        for size in reversed(sizes):  # the largest first: the others find room in its memory
            graphs.capture(
                size,
                self.begin_decodes(1, size),
                self.forward,
                warm_up=lambda size, tensors: self.forward(size, tensors, first_layer),
            )
        return graphs

    def begin_decodes(
        self, num_decodes: int, size: int, position: int = 0
    ) -> dict[str, np.ndarray]:
        """Decodes that nobody asked for, in a step of a graph's size: of rows that belong to
        nobody yet, or the one that never does."""
        last = self.inputs.padding_row + 1 if num_decodes == 1 else num_decodes
        rows = np.arange(last - num_decodes, last)
        step = StepInput(
            decode_rows=rows,
            decode_positions=np.full_like(rows, position),
            decode_blocks=np.full_like(rows, -1)[None],
        )
        self.inputs.last_tokens.zero_()  # nobody has drawn any
        self.inputs.steps_listed = 0  # it does not follow the step before
        return self.inputs.begin(step, size)
