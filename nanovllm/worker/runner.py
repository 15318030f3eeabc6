"""Runs steps: what a StepInput says through the model to sampled tokens, one way for all steps and
devices.

worker.py makes one of a model and a cache; executor.py hands it StepInputs. inputs.py builds the
batch, rows.py keeps the rows' state, sampler.py samples again where logits are changed.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from nanovllm import ops
from nanovllm.core.step import StepInput
from nanovllm.models.frame import CausalLM
from nanovllm.ops.batch import Attention, KVCache
from nanovllm.worker.graphs import StepGraphs, least_mixed_of
from nanovllm.worker.inputs import InputBuilder, StepShape
from nanovllm.worker.logprobs import LogprobsReader
from nanovllm.worker.record import NUM_RECORDS, StepRecord, make_records
from nanovllm.worker.rows import Rows
from nanovllm.worker.sampler import Sampler


class Forwarded(NamedTuple):
    """What a forward leaves on the device, until the next one.

    Attributes:
        hidden: [T, hidden], before the final norm.
        logits: [n, vocab], of the sampled tokens, padding last.
        token_ids: [n] int64, the sampled tokens. Rows and host have them already.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    token_ids: torch.Tensor


class ModelRunner:
    """A model, a cache and the rows' state.

    Args:
        model: with weights.
        kv: the cache.
        attentions: the backend of each group of layers.
        max_num_seqs: rows.
        max_num_batched_tokens: query tokens of the largest step.
        max_blocks: blocks of the longest sequence.
        vocab_size: of the logits.

    Attributes:
        graphs: of steps of few tokens; None: all steps are launched kernel by kernel.
        least_mixed, mixed_keys: as in Attention, for all groups together.
        logits: on a GPU, where every step puts its logits; None on a CPU.
    """

    def __init__(
        self,
        model: CausalLM,
        kv: KVCache,
        attentions: tuple[Attention, ...],
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_blocks: int,
        vocab_size: int,
    ):
        self.model, self.kv, self.max_num_seqs = model, kv, max_num_seqs
        cache = kv.data[0]
        max_tokens = max(max_num_seqs, max_num_batched_tokens)
        self.rows = Rows(max_num_seqs, len(attentions), max_blocks, vocab_size, cache.device)
        self.inputs = InputBuilder(self.rows, attentions, cache.shape[3], max_tokens)
        self.records, self.host_tokens = make_records(
            max_num_seqs, len(attentions), max_tokens, cache.device
        )
        self.num_steps = 0
        self.sampler = Sampler(self.rows)
        self.logprobs = LogprobsReader(max_num_seqs, vocab_size)
        self.graphs: StepGraphs | None = None
        self.least_mixed = least_mixed_of(attentions)
        self.mixed_keys = min(attention.mixed_keys for attention in attentions)
        self.logits: torch.Tensor | None = None
        if cache.device.type == "cuda":
            shape = (max_num_seqs, vocab_size)
            self.logits = torch.empty(shape, dtype=cache.dtype, device=cache.device)

    def take_record(self) -> StepRecord:
        """The next step's record."""
        record = self.records[self.num_steps % NUM_RECORDS]
        self.num_steps += 1
        record.begin()
        return record

    @torch.inference_mode()
    def run(self, step: StepInput) -> StepRecord:
        """Launch one step: forward and sampling, and what its requests want beside."""
        record = self.take_record()
        try:
            self._run(step, record)
        finally:  # after an interrupt too: kernels may have been launched
            record.end()
        return record

    def _run(self, step: StepInput, record: StepRecord) -> None:
        rows, columns = self.rows, record.arrays
        rows.start(step.starts, record)
        size = record.graph_size = self.graph_size(step)
        arrays = self.inputs.begin(step, record, size)
        limited = rows.any_limited and bool(rows.limited[columns.row[: record.num_tokens]].any())
        if self.graphs is not None and size is not None:
            shape = self.graph_shape(size, limited)
            done = self.graphs.run(shape, arrays, record, self.forward)
        else:
            num_tokens, num_sampled = record.num_tokens, record.num_sampled
            longest = max((len(chunk.token_ids) for chunk in step.chunks), default=1)
            gathers, is_decode = num_sampled != num_tokens, not step.chunks
            shape = StepShape(num_tokens, num_sampled, gathers, limited, is_decode, longest)
            done = self.forward(shape, record.upload(arrays))
        if record.num_sampled and (rows.any_changed or rows.any_logprobs):
            self._finish(done, record)
        if step.scorings:
            record.scores = self.logprobs.score(step, done.hidden, self.model.logits, record)

    def forward(
        self, shape: StepShape, arrays: dict[str, torch.Tensor], kv: KVCache | None = None
    ) -> Forwarded:
        """The step that began last, from its batch to sampled tokens, replayed by a CUDA graph or
        not. It reads nothing of the host.

        Args:
            arrays: what attention needs.
            kv: some layers' cache, to try them alone; None: all.
        """
        n, tensors = shape.num_sampled, self.inputs.tensors
        hidden = self.model(self.inputs.batch(shape, arrays), kv or self.kv)
        if n == 0:
            return Forwarded(hidden, hidden[:0], tensors.rows[:0])
        sampled = hidden[tensors.sampled_tokens[:n]] if shape.gathers else hidden
        out = None if self.logits is None else self.logits[:n]
        logits = self.model.logits(sampled, out=out)
        draws = tensors.draws if shape.limited else tensors.draws[:2]
        token_ids = ops.sample(logits, *(x[:n] for x in draws if x is not None))
        self._keep(n, token_ids)
        return Forwarded(hidden, logits, token_ids)

    def _keep(self, n: int, token_ids: torch.Tensor) -> None:
        """Sampled tokens go to the rows, whose next decodes feed on them, and to the host."""
        last_tokens, tensors = self.rows.state.last_tokens, self.inputs.tensors
        ops.keep_sampled(last_tokens, self.host_tokens, tensors.rows[:n], token_ids, tensors.slot)

    def _finish(self, done: Forwarded, record: StepRecord) -> None:
        """Other tokens for rows whose logits are changed, and log-probabilities."""
        columns, n = record.arrays, record.num_sampled
        sampled = np.flatnonzero(columns.sampled[: record.num_tokens] >= 0)
        rows = columns.row[sampled].astype(np.int64)
        positions = columns.position[sampled].astype(np.int64) + 1
        logits, token_ids = done.logits[:n], done.token_ids[:n]
        draws = self.inputs.tensors.draws
        if self.sampler.sample(token_ids, logits, draws, rows, positions, record):
            self._keep(n, token_ids)
        wanted = np.flatnonzero(self.rows.wants_logprobs[rows])
        if wanted.size:
            record.logprobs = self.logprobs.read(logits, token_ids, wanted, record)

    # CUDA graphs

    def graph_size(self, step: StepInput) -> int | None:
        """The size of the CUDA graph that the step replays; None: it is launched."""
        if self.graphs is None:
            return None
        num_tokens = step.num_decodes
        if step.chunks:
            lens = np.array([len(chunk.token_ids) for chunk in step.chunks])
            ends = np.array([chunk.position for chunk in step.chunks]) + lens
            if self.least_mixed is None or (lens * ends).sum() > self.mixed_keys:
                return None
            num_tokens = max(self.least_mixed, num_tokens + int(lens.sum()))
        return self.graphs.padded_size(num_tokens)

    def graph_shape(self, size: int, limited: bool) -> StepShape:
        """The shape of all steps of a graph's size. Every token is a query of its own, whatever its
        sequence. Graphs that may hold chunks gather the tokens to sample after."""
        gathers = self.least_mixed is not None and size >= self.least_mixed
        return StepShape(size, min(size, self.max_num_seqs), gathers, limited)

    @torch.inference_mode()
    def capture(self, sizes: list[int], limited: bool) -> StepGraphs:
        """Graphs of these sizes, by steps of padding alone; with `limited` one more for each, whose
        draws have limits. Others are captured when a step needs one."""
        graphs = StepGraphs(sizes, self.kv.data[0].device)
        warm_up = partial(self.forward, kv=self.kv.first_layers)
        for size in reversed(sizes):  # the largest first: the others find room in its memory
            for with_limits in (False, True)[: 1 + limited]:
                record = self.take_record()
                arrays = self.begin_decodes(1, size, record)
                shape = self.graph_shape(size, with_limits)
                graphs.capture(shape, arrays, record, self.forward, warm_up)
                record.end()
        return graphs

    def begin_decodes(
        self, num_decodes: int, size: int, record: StepRecord, position: int = 0
    ) -> dict[str, np.ndarray]:
        """Begin a step of decodes that belong to no sequence, of rows that have none yet or of
        padding's, in a graph's size."""
        last = self.max_num_seqs + 1 if num_decodes == 1 else num_decodes
        rows = np.arange(last - num_decodes, last)
        step = StepInput(
            decode_rows=rows,
            decode_positions=np.full_like(rows, position),
            decode_blocks=np.full((len(self.inputs.attentions), num_decodes), -1, np.int32),
        )
        self.rows.state.last_tokens.zero_()  # no row has sampled any
        self.inputs.list_age = 0  # it does not follow the step before
        return self.inputs.begin(step, record, size)
