"""Prompts and parameters -> checked sequences; sequences -> what users get of them.

llm.py calls it before a request runs, clients.py when it has news. Which forms prompts and
parameters may have is prompts.py's business, the text the detokenizer's.
"""

import threading
import time
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from xxhash import xxh3_64_intdigest

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.scheduler import Scheduler
from nanovllm.engine.sequence import Sequence, shown
from nanovllm.frontend import prompts, scoring, tokens
from nanovllm.frontend.scoring import Scored
from nanovllm.frontend.structured_outputs import GrammarCompiler
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams, refuses_deep_nesting


class Requests:
    """Makes the sequences and the outputs of one LLM's requests.

    Args:
        checkpoint: its tokenizer, EOS tokens, vocabulary and default parameters.
        detokenizer: None: there is no text.
        max_model_len: tokens of a sequence at most.
        seed: the engine's, for requests that have none.

    Attributes:
        num_made: requests so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        detokenizer: Detokenizer | None,
        max_model_len: int,
        seed: int,
    ):
        self.checkpoint = checkpoint
        self.detokenizer = detokenizer
        self.max_model_len = max_model_len
        self.seed = seed
        self.grammars = GrammarCompiler(
            checkpoint.tokenizer, checkpoint.model_config.vocab_size, checkpoint.eos_token_ids
        )
        self.num_made = 0
        # Requests are numbered one after another; a signal's handler may come in between.
        self.lock = threading.RLock()

    def after_fork(self) -> None:
        """In a forked process, where another thread may have held a lock."""
        self.lock = threading.RLock()
        self.grammars.start_anew()

    @refuses_deep_nesting("prompts and parameters")
    def make(
        self,
        prompt_list: Any,
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        priority: SequenceOf[int] | None = None,
        request_id: str | None = None,
        output_kind: RequestOutputKind | None = None,
    ) -> list[Sequence]:
        """Checked sequences for all prompts, the samples of each one after another; or an error
        before any is made. Called in the caller's thread.

        Args:
            prompt_list, sampling_params, priority: as for LLM.generate.
            request_id: of a single prompt; None: numbers.
            output_kind: instead of the parameters'.
        """
        checkpoint = self.checkpoint
        vocab_size = checkpoint.model_config.vocab_size
        if sampling_params is None:
            sampling_params = checkpoint.default_sampling_params
        # No call waits for another's long prompt: encoding changes no tokenizer.
        tokenized = prompts.normalize(
            prompt_list, checkpoint.tokenizer, vocab_size, self.max_model_len, request_id
        )
        params = prompts.match_params(sampling_params, len(tokenized))
        for i, p in {id(p): (i, p) for i, p in enumerate(params)}.values():
            try:
                prompts.bind_params(p, vocab_size, checkpoint.tokenizer, self.max_model_len)
                # Compiling may take seconds, and delays no other caller.
                if p.structured_outputs is not None and p.grammar is None:
                    p.grammar = self.grammars.compile(p.structured_outputs)
            except ValueError as error:
                if isinstance(sampling_params, SamplingParams):  # one for all prompts
                    raise
                raise ValueError(f"sampling_params {i}: {error}") from error
            p.output_kind = output_kind or p.output_kind
        priorities = [0] * len(tokenized)
        if priority is not None:
            priorities = prompts.match_priorities(priority, len(tokenized))
        with self.lock:
            first = self.num_made
            self.num_made += len(tokenized)
        now, seqs = time.monotonic(), []
        for number, prompt, p, own_priority in zip(
            range(first, first + len(tokenized)), tokenized, params, priorities, strict=True
        ):
            others = p
            if p.n > 1 and p.prompt_logprobs is not None:  # the first sample's are enough
                others = copy(p)
                others.prompt_logprobs = None
            samples = [
                Sequence(
                    request_id or str(number),
                    prompt.token_ids[:] if index else prompt.token_ids,
                    others if index else p,
                    seed=_sequence_seed(p.seed, self.seed, number, index),
                    max_model_len=self.max_model_len,
                    eos_token_ids=checkpoint.eos_token_ids,
                    prompt=prompt.text,
                    arrival_time=now,
                    priority=own_priority,
                )
                for index in range(p.n)
            ]
            Sequence.join(samples)
            seqs += samples
        return seqs

    def make_scored(self, scored: list[Scored]) -> list[Sequence]:
        """Sequences that score tokens after the tokens before them."""
        with self.lock:
            first = self.num_made
            self.num_made += len(scored)
        return [
            Sequence(
                str(number),
                array("I", token_ids[:-1]),
                scoring.PARAMS,
                seed=0,
                max_model_len=self.max_model_len + 1,
                arrival_time=time.monotonic(),
                targets=token_ids[start:],
                score_from=start,
            )
            for number, (token_ids, start) in enumerate(scored, first)
        ]

    def news(self, seqs: Iterable[Sequence]) -> list[RequestOutput]:
        """Of sequences that have news an output for each request, as its output_kind says."""
        by_request: dict[str, list[Sequence]] = {}
        for seq in seqs:
            by_request.setdefault(seq.request_id, []).append(seq)
        outputs = []
        for samples in by_request.values():
            kind = samples[0].params.output_kind
            if kind is RequestOutputKind.DELTA:
                outputs.append(self.output(samples, delta=True))
            elif kind is RequestOutputKind.CUMULATIVE or samples[0].request_finished:
                outputs.append(self.output(samples[0].samples))
        return outputs

    def output(self, samples: list[Sequence], delta: bool = False) -> RequestOutput:
        """What samples of a request have so far, or only what is new since the last such call.
        Called in the engine's thread."""
        seq = samples[0]
        first = seq.samples[0]
        prompt_logprobs: SequenceOf[dict[int, Logprob] | None] | None = None
        if first.scores is not None:
            prompt_logprobs = []
            if not (delta and first.delivered[0]):  # else they were in the first
                scores = first.scores.copy(self._token_text(seq), seq.token_ids[:1])
                lines = PromptLogprobs(scores)
                prompt_logprobs = lines.flat() if seq.params.flat_logprobs else lines
        finished = seq.request_finished
        num_tokens = sum(len(s.token_ids) - s.num_prompt_tokens for s in seq.samples)
        metrics = replace(seq.metrics, num_generation_tokens=num_tokens)
        if not finished:  # some samples may have
            metrics.finished_time = None
        if len(samples) > 1:
            samples = sorted(samples, key=attrgetter("index"))
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(sample, delta) for sample in samples],
            finished=finished,
            metrics=metrics,
            num_cached_tokens=first.num_cached_tokens or 0,
        )

    def _completion(self, seq: Sequence, delta: bool) -> CompletionOutput:
        token_ids = seq.output_token_ids
        logprobs: SequenceOf[dict[int, Logprob]] | None = None
        cumulative, start = None, 0
        failure: Exception | None = None
        try:
            text = self.detokenizer.text(seq) if self.detokenizer else ""
        except Exception as error:  # a tokenizer may raise anything
            text, failure = "", error
        if delta:
            start, num_characters = seq.delivered
            seq.delivered = len(token_ids), max(num_characters, len(text))
            text, token_ids = text[num_characters:], token_ids[start:]
        if failure is not None and seq.finished:  # before, others that run must not suffer
            return _without_text(seq, token_ids, failure)
        if seq.logprobs is not None:
            lines = seq.logprobs.copy(self._token_text(seq))
            logprobs = lines[start:] if delta else lines
            if seq.params.flat_logprobs:
                logprobs = lines.flat(start)
            cumulative = seq.logprobs.cumulative
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
            error=seq.error,
        )

    def _token_text(self, seq: Sequence) -> Callable[[list[int], int], str] | None:
        tokenizer = self.checkpoint.tokenizer
        if tokenizer is None or not seq.params.detokenize:
            return None
        return partial(tokens.token_text, tokenizer)


def _without_text(seq: Sequence, token_ids: Any, error: Exception) -> CompletionOutput:
    """Of an ended sequence whose tokens the tokenizer can't decode."""
    return CompletionOutput(
        index=seq.index,
        text="",
        token_ids=token_ids,
        finish_reason="error",
        error=f"request {seq.request_id!r} has no text, as the tokenizer fails: {shown(error)}",
    )


def batch_order(seqs: list[Sequence], scheduler: Scheduler) -> list[Sequence]:
    """The order in which a whole batch is queued: the one in which it is done soonest. Longest
    first where rows are too few: what starts last would else run on alone. As given where blocks
    are too few: sequences of like length need their most blocks at the same time."""
    blocks, max_num_seqs = scheduler.block_manager, scheduler.max_num_seqs
    num_blocks = sum(blocks.blocks_for(seq.max_len) for seq in seqs)
    if len(seqs) <= max_num_seqs or num_blocks * max_num_seqs > blocks.num_blocks * len(seqs):
        return seqs
    return sorted(seqs, key=lambda seq: seq.num_prompt_tokens - seq.max_len)


def _sequence_seed(seed: int | None, engine_seed: int, request_number: int, index: int) -> int:
    """64 bits: from the request's seed or, where it has none, the engine's seed and the request's
    number; and from the index of the sample in it."""
    origin = f"engine {engine_seed} {request_number}" if seed is None else f"request {seed}"
    return xxh3_64_intdigest(f"{origin} sample {index}".encode())
