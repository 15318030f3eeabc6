"""Runs steps: what a StepInput says through the model and the sampler.

worker.py makes one when weights and cache have memory, and executor.py hands it StepInputs;
inputs.py and sampler.py hold the rows' state.
"""

from typing import NamedTuple

import numpy as np
import torch

from nanovllm import ops
from nanovllm.batch import KVCache
from nanovllm.models.decoder import CausalLM
from nanovllm.outputs import LogprobLines
from nanovllm.step import StepInput
from nanovllm.worker.cuda_graph import DecodeGraphs, DecodeOutput, graph_sizes
from nanovllm.worker.inputs import InputBuilder
from nanovllm.worker.sampler import Sampler


class Sampled(NamedTuple):
    """What a step gives, in memory that the device writes to; it stays there for some steps.

    Attributes:
        token_ids: [sampled sequences] int64.
        logprobs: theirs.
        scores: of the step's scorings.
        errors: of the tokens that could not be drawn, by their place.
    """

    token_ids: np.ndarray
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
        graphs: of steps of decodes alone; None: they run without.
        decode_logits: where all those steps of a GPU, whatever their graph, put their logits.
    """

    def __init__(self, model: CausalLM, kv: KVCache, inputs: InputBuilder, sampler: Sampler):
        self.model, self.kv, self.inputs, self.sampler = model, kv, inputs, sampler
        self.uploader = inputs.uploader
        self.graphs: DecodeGraphs | None = None
        device, self.max_num_seqs = kv.data.device, inputs.padding_row
        self.is_gpu = device.type == "cuda"
        if self.is_gpu:
            shape = (self.max_num_seqs, sampler.vocab_size)
            self.decode_logits = torch.empty(shape, dtype=kv.data.dtype, device=device)

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
        logprobs: LogprobLines | None,
        scores: LogprobLines | None = None,
    ) -> Sampled:
        token_ids = self.inputs.sampled(len(rows))
        return Sampled(token_ids, logprobs, scores, self.sampler.host.drawn(rows, token_ids))

    def graph_size(self, step: StepInput) -> int | None:
        """The size of the CUDA graph that the step replays; None: it runs without."""
        if self.graphs is None or step.chunks:
            return None
        return self.graphs.padded_size(step.num_decodes)

    def _run_decodes(self, step: StepInput) -> LogprobLines | None:
        num_decodes = step.num_decodes
        size = self.graph_size(step) or num_decodes
        arrays = self.inputs.begin_decode(step, size)
        if self.graphs:
            output = self.graphs.run(size, arrays, self.decode)
        else:
            output = self.decode(size, self.uploader.upload(arrays))
        if self.sampler.all_plain:
            return None
        rows, positions = step.decode_rows, step.decode_positions + 1
        logits, drawn = output.logits[:num_decodes], output.rows[:num_decodes]
        if not self.sampler.is_plain(rows, positions):
            # Warpers and changed logits: other draws in place of the first.
            token_ids = self.sampler.sample(logits, rows, positions)
            self.inputs.keep_sampled(drawn, token_ids, output.turn)
        if not self.sampler.logprobs.asks[rows].any():
            return None
        return self.sampler.logprobs.read(logits, self.inputs.last_tokens[drawn], rows)

    def decode(
        self, size: int, attention_tensors: dict[str, torch.Tensor], kv: KVCache | None = None
    ) -> DecodeOutput:
        """A step of decodes, drawn by temperature alone, without a look at the host."""
        batch, tensors = self.inputs.decode_batch(size, attention_tensors)
        hidden = self.model(batch, kv or self.kv)
        logits = self.model.logits(hidden, out=self.decode_logits[:size])
        token_ids = ops.sample(logits, tensors["temperature"], tensors["noise_keys"])
        self.inputs.keep_sampled(tensors["rows"], token_ids, tensors["turn"])
        return DecodeOutput(logits, tensors["rows"], tensors["turn"])

    def use_graphs(self) -> None:
        """From now on, for steps of decodes."""
        self.graphs = self.capture(graph_sizes(self.max_num_seqs))
        self.inputs.capture_begin(self.graphs)

    @torch.inference_mode()
    def capture(self, sizes: list[int]) -> DecodeGraphs:
        """Graphs of decodes, of padding alone."""
        graphs = DecodeGraphs(sizes, self.uploader)
        first_layer = self.kv.first_layer
        for size in reversed(sizes):  # the largest first: the others find room in its memory
            graphs.capture(
                size,
                self.begin_decodes(1, size),
                self.decode,
                warm_up=lambda size, tensors: self.decode(size, tensors, first_layer),
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
            decode_pages=np.full_like(rows, -1),
        )
        self.inputs.last_tokens.zero_()  # nobody has drawn any
        self.inputs.steps_listed = 0  # it does not follow the step before
        return self.inputs.begin_decode(step, size)
