"""Prompts and parameters -> checked sequences; sequences -> what users get of them.

llm.py calls it before a request runs and when it has news. Which forms prompts and parameters may
have is prompts.py's business, the text the detokenizer's.
"""

import time
from array import array
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from copy import copy
from dataclasses import replace
from operator import attrgetter
from typing import Any

from xxhash import xxh3_64_intdigest

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.frontend import prompts, scoring
from nanovllm.frontend.scoring import Scored
from nanovllm.frontend.structured_outputs import GrammarCompiler
from nanovllm.models.checkpoint import Checkpoint
from nanovllm.outputs import CompletionOutput, Logprob, PromptLogprobs, RequestOutput
from nanovllm.sampling_params import RequestOutputKind, SamplingParams


class RequestError(RuntimeError):
    """A request was ended by an error of its own, the cause."""

    def __init__(self, request_id: str, message: str):
        super().__init__(message)
        self.request_id = request_id


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

    def make(
        self,
        engine: Engine,
        prompt_list: Any,
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        request_id: str | None = None,
    ) -> list[Sequence]:
        """Checked sequences for all prompts, the samples of each one after another; or an error
        before any is made.

        Args:
            engine: where they will run; their ids are free there.
            prompt_list, sampling_params: as for LLM.generate.
            request_id: of a single prompt; None: numbers.
        """
        _check_awake(engine)
        checkpoint = self.checkpoint
        vocab_size = checkpoint.model_config.vocab_size
        tokenized = prompts.normalize(
            prompt_list, checkpoint.tokenizer, vocab_size, self.max_model_len, request_id
        )
        if sampling_params is None:
            sampling_params = checkpoint.default_sampling_params
        params = prompts.match_params(sampling_params, len(tokenized))
        for p in {id(p): p for p in params}.values():  # one may serve all prompts
            prompts.bind_params(p, vocab_size, checkpoint.tokenizer)
            if p.structured_outputs is not None:
                p.grammar = self.grammars.compile(p.structured_outputs)
        now = time.monotonic()
        seqs = []
        for prompt, p in zip(tokenized, params, strict=True):
            number = self.num_made
            self.num_made += 1
            own_id = request_id or _free_id(engine, number)
            others = p
            if p.n > 1 and p.prompt_logprobs is not None:  # the first sample's are enough
                others = copy(p)
                others.prompt_logprobs = None
            samples = [
                Sequence(
                    own_id,
                    prompt.token_ids[:] if index else prompt.token_ids,
                    others if index else p,
                    seed=_sequence_seed(p.seed, self.seed, number, index),
                    max_model_len=self.max_model_len,
                    eos_token_ids=checkpoint.eos_token_ids,
                    prompt=prompt.text,
                    arrival_time=now,
                )
                for index in range(p.n)
            ]
            Sequence.join(samples)
            seqs += samples
        return seqs

    def make_scored(self, engine: Engine, scored: list[Scored]) -> list[Sequence]:
        """Sequences that score tokens after those before them."""
        _check_awake(engine)
        seqs = []
        for token_ids, start in scored:
            seqs.append(
                Sequence(
                    _free_id(engine, self.num_made),
                    array("I", token_ids[:-1]),
                    scoring.PARAMS,
                    seed=0,
                    max_model_len=self.max_model_len + 1,
                    arrival_time=time.monotonic(),
                    targets=token_ids[start:],
                    score_from=start,
                )
            )
            self.num_made += 1
        return seqs

    def news(self, engine: Engine, left_out: set[Sequence]) -> list[RequestOutput]:
        """Of the sequences that advanced, an output for each request, as its output_kind says."""
        final_only, delta = RequestOutputKind.FINAL_ONLY, RequestOutputKind.DELTA
        news = [
            seq
            for seq in engine.advanced
            if seq not in left_out
            and (
                seq.params.output_kind is not final_only or seq.request_id not in engine.unfinished
            )
        ]
        news.sort(key=lambda seq: seq.error is None)  # raised before anybody's news are taken
        return [
            self.output(engine, seqs, delta=True)
            if seqs[0].params.output_kind is delta
            else self.output(engine, seqs[0].samples)
            for seqs in by_request(news)
        ]

    def output(self, engine: Engine, samples: list[Sequence], delta: bool = False) -> RequestOutput:
        """What samples of a request have so far, or only what is new since the last such call.
        Raises RequestError for a request that an error ended, and takes its news."""
        for seq in samples:
            if seq.error is not None:
                for sample in seq.samples:
                    engine.advanced.pop(sample, None)
                raise RequestError(
                    seq.request_id,
                    f"request {seq.request_id!r} ended by an error in its logits_processors or its "
                    f"structured_outputs after {len(seq.token_ids) - seq.num_prompt_tokens} "
                    f"tokens: {seq.error!r}",
                ) from seq.error
        seq = samples[0]
        first = (seq.siblings or samples)[0]
        prompt_logprobs: SequenceOf[dict[int, Logprob] | None] | None = None
        if first.scores is not None:
            prompt_logprobs = []
            if not (delta and first.delivered[0]):  # else they were in the first
                prompt_logprobs = PromptLogprobs(first.scores.copy(self._token_text(seq)))
        finished = seq.request_finished
        metrics = replace(seq.metrics)
        if not finished:  # some samples may have
            metrics.finished_time = None
        if len(samples) > 1:
            samples = sorted(samples, key=attrgetter("index"))
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            prompt_logprobs=prompt_logprobs,
            outputs=[self._completion(engine, sample, delta) for sample in samples],
            finished=finished,
            metrics=metrics,
            num_cached_tokens=first.num_cached_tokens or 0,
        )

    def _completion(self, engine: Engine, seq: Sequence, delta: bool) -> CompletionOutput:
        text = self.detokenizer.text(seq) if self.detokenizer else ""
        token_ids = seq.output_token_ids
        logprobs: SequenceOf[dict[int, Logprob]] | None = None
        cumulative = None
        if seq.logprobs is not None:
            engine.scheduler.logprobs.take(seq)
            logprobs = seq.logprobs.copy(self._token_text(seq))
            cumulative = seq.logprobs.cumulative
        if delta:
            num_tokens, num_characters = seq.delivered
            seq.delivered = len(token_ids), len(text)
            text, token_ids = text[num_characters:], token_ids[num_tokens:]
            logprobs = logprobs and logprobs[num_tokens:]
        return CompletionOutput(
            index=seq.index,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )

    def _token_text(self, seq: Sequence) -> Callable[[list[int]], str] | None:
        tokenizer = self.checkpoint.tokenizer
        return tokenizer.decode if tokenizer is not None and seq.params.detokenize else None


def by_request(seqs: Iterable[Sequence]) -> list[list[Sequence]]:
    """Sequences, those of a request together."""
    groups: dict[str, list[Sequence]] = {}
    for seq in seqs:
        groups.setdefault(seq.request_id, []).append(seq)
    return list(groups.values())


def _check_awake(engine: Engine) -> None:
    if engine.executor.sleeping:
        raise RuntimeError("this LLM sleeps: call wake_up() first")


def _free_id(engine: Engine, number: int) -> str:
    request_id = str(number)
    while engine.has_request(request_id):  # somebody chose our number
        request_id += "'"
    return request_id


def _sequence_seed(seed: int | None, engine_seed: int, request_number: int, index: int) -> int:
    """64 bits: from the request's seed or, where it has none, the engine's seed and the request's
    number; and from the index of the sample in it."""
    origin = f"engine {engine_seed} {request_number}" if seed is None else f"request {seed}"
    return xxh3_64_intdigest(f"{origin} sample {index}".encode())
