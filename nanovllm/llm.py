"""LLM, what users import: prompts in, RequestOutputs out. The one place that wires engine to
worker.

It tokenizes and checks requests; the engine decides what runs when; the worker computes.
"""

import copy
import gc
import logging
import time
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from tqdm.auto import tqdm
from xxhash import xxh3_64_intdigest

from nanovllm import chat, platform, prompts, scoring
from nanovllm.checkpoint import read_checkpoint
from nanovllm.config import EngineConfig
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics_reader import read_metrics
from nanovllm.engine.sequence import Sequence
from nanovllm.fair_lock import FairLock
from nanovllm.metrics import EngineMetrics, Metric
from nanovllm.models import model_class
from nanovllm.outputs import (
    CompletionOutput,
    Loglikelihood,
    Logprob,
    PromptLogprobs,
    RequestOutput,
)
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.worker.executor import InProcessExecutor
from nanovllm.worker.model_runner import PARTS

logger = logging.getLogger(__name__)

Prompt = str | list[int] | dict[str, Any]
Message = dict[str, Any]
Pair = tuple[str, str] | tuple[list[int], list[int]]
Output = TypeVar("Output")


class LLM:
    """A language model that generates text for batches of prompts.

    Args:
        model: a folder in Hugging Face's format, or a name on the hub.
        options: vLLM's; see config.EngineConfig.

    Raises:
        ValueError, TypeError: an option, the checkpoint or the memory won't do; the message says
        why and what would.

    Example:
        >>> llm = LLM("assets/tiny-qwen3")
        >>> llm.generate("In the beginning", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str, **options: Any):
        self._engine: Engine | None = None
        self._why_closed = "this LLM is closed"
        self._lock = FairLock()
        self.config = config = EngineConfig.from_options(model, **options)
        device = platform.resolve_device(config.device)
        self._checkpoint = read_checkpoint(config)
        self.model_config = self._checkpoint.model_config
        model_class(self.model_config.architecture)  # before weights are fetched or read
        tokenizer = self._checkpoint.tokenizer
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._num_requests = 0
        self._owned: set[Sequence] = set()  # generate and stream hand these out, step doesn't

        max_num_seqs, max_num_batched_tokens = platform.batch_limits(
            config.max_num_seqs, config.max_num_batched_tokens, device
        )
        executor = InProcessExecutor(
            config, self.model_config, device, max_num_seqs, max_num_batched_tokens
        )
        plan = executor.plan
        self.max_model_len = plan.max_model_len
        overlaps = config.async_scheduling
        if overlaps is None:
            overlaps = device.type == "cuda"
        self._engine = Engine(
            executor,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching is not False,
            # On a CPU there is nothing to overlap with: the worker computes in the caller's thread.
            depth=2 if overlaps else 1,
            detokenizer=self._detokenizer,
        )
        logger.info(
            "%s on %s; KV cache of %d tokens in pages of %d, %.1f requests of %d tokens",
            self.model_config.architecture,
            executor.description,
            plan.num_tokens,
            plan.block_size,
            plan.num_blocks / plan.max_blocks,
            plan.max_model_len,
        )

    # Whole batches

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for every prompt, and wait.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or
                a list of those.
            sampling_params: one for all, or one each; None: the checkpoint's generation_config.
            use_tqdm: show a progress bar.

        Returns: an output for each prompt, in the order of the prompts.

        Raises:
            ValueError, TypeError: a prompt or parameter won't do; then none has run.
        """
        with ExitStack() as first_step:
            first_step.enter_context(_no_collections())
            return self._run(
                lambda: self._make_sequences(prompts, sampling_params),
                use_tqdm,
                self._output,
                on_step=first_step.close,
            )

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of every conversation, and wait.

        Args:
            messages: a conversation, that is a list of {"role": ..., "content": ...}, or a list of
                conversations.
            sampling_params, use_tqdm: as for generate.
            chat_template: a Jinja template; None: the checkpoint's.
            add_generation_prompt: begin the answer's message.
            continue_final_message: go on with the last message instead.
            tools: functions that the template tells the model of, as JSON schemas.
            chat_template_kwargs: what else the template reads.

        Returns: an output for each conversation, in their order.

        Raises:
            ValueError, TypeError: the conversations, or the parameters, won't do; then none has
            run.
        """
        options = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        prompts = chat.render(messages, self.get_tokenizer(), options)
        return self.generate(prompts, sampling_params, use_tqdm)

    def loglikelihood(self, pairs: SequenceOf[Pair], use_tqdm: bool = True) -> list[Loglikelihood]:
        """Score given continuations of contexts. Equal contexts are computed once.

        Args:
            pairs: a list of (context, continuation), two texts or two lists of token ids. Both
                together may have max_model_len + 1 tokens. An empty context is BOS, or else EOS.
            use_tqdm: show a progress bar.

        Returns: for each pair, what the model says of the continuation's tokens.

        Raises:
            ValueError, TypeError: a pair won't do; then none has run.
        """
        return self._score(scoring.from_pairs(pairs, *self._scoring_limits), use_tqdm)

    def loglikelihood_rolling(
        self, texts: Prompt | SequenceOf[Prompt], use_tqdm: bool = True
    ) -> list[Loglikelihood]:
        """Score whole texts of any length, by windows of max_model_len tokens; each is scored by
        itself, beginning after BOS, or else EOS.

        Args:
            texts: as the prompts of generate.
            use_tqdm: show a progress bar.

        Returns: for each text, what the model says of its tokens.

        Raises:
            ValueError, TypeError: a text won't do; then none has run.
        """
        windows = scoring.from_texts(texts, *self._scoring_limits)
        parts = iter(self._score([part for text in windows for part in text], use_tqdm))
        return [scoring.join(islice(parts, len(text))) for text in windows]

    @property
    def _scoring_limits(self) -> tuple[Any, int, int]:
        return self._checkpoint.tokenizer, self.model_config.vocab_size, self.max_model_len

    def _score(self, scored: list[scoring.Scored], use_tqdm: bool) -> list[Loglikelihood]:
        def read(seq: Sequence) -> Loglikelihood:
            assert seq.scores is not None
            return scoring.read(seq.scores)

        def make() -> list[Sequence]:
            self._check_awake()
            seqs = []
            for token_ids, start in scored:
                seqs.append(
                    Sequence(
                        self._free_id(self._num_requests),
                        token_ids[:-1],
                        scoring.PARAMS,
                        seed=0,
                        max_model_len=self.max_model_len + 1,
                        arrival_time=time.monotonic(),
                        targets=token_ids[start:],
                        score_from=start,
                    )
                )
                self._num_requests += 1
            return seqs

        return self._run(make, use_tqdm, read)

    @contextmanager
    def _own(self, seqs: list[Sequence]) -> Iterator[None]:
        """These are one call's. However it ends, Ctrl-C too, nothing of them stays, and others'
        requests do."""
        self._owned.update(seqs)
        try:
            yield
        finally:
            with self._lock:
                self._owned.difference_update(seqs)
                if self._engine is not None:
                    self._engine.abort(seqs)

    def _run(
        self,
        make: Callable[[], list[Sequence]],
        use_tqdm: bool,
        read: Callable[[Sequence], Output],
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Output]:
        """Step until the sequences that are made have ended, and read each. Other threads that want
        a turn have it between two steps: they add their requests to the batch, and step as well."""
        outputs: dict[Sequence, Output] = {}

        def take(ended: Collection[Sequence]) -> None:
            for seq in ended:
                if seq.finish_reason == "error":
                    raise RuntimeError(
                        f"request {seq.request_id} was in two steps of other threads that failed; "
                        f"those have the reason"
                    )
                running.remove(seq)
                outputs[seq] = read(seq)
            progress.show(num_finished=len(outputs))

        with ExitStack() as stack:
            with self._use_engine() as engine:
                seqs = make()
                stack.enter_context(self._own(seqs))
                engine.add_batch(seqs)
                running = set(seqs)
            progress = stack.enter_context(
                _Progress(len(seqs), engine.metrics, disable=not use_tqdm)
            )
            while running:
                with self._use_engine() as engine:
                    take([seq for seq in running if seq.finished])  # in the turns of others
                    while running:
                        ended = running.intersection(engine.step())
                        # What follows costs nothing: a GPU runs the next step meanwhile.
                        on_step()  # ends the wait of garbage collections, once
                        take(ended)
                        if self._lock.is_wanted:
                            break
        return [outputs[seq] for seq in seqs]

    # As it comes

    def stream(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Generate for every prompt, and hand out each token as it comes.

        The requests are queued by this call. Those that are unfinished when the iterator is closed
        or dropped (by `break`, by an exception) are aborted.

        Args:
            prompts, sampling_params: as for generate.

        Returns: an iterator over outputs of what is new, as of RequestOutputKind.DELTA; `index`
            says of which prompt. A text never ends inside a character; it may be empty.

        Raises:
            ValueError, TypeError: a prompt or parameter won't do; then none has run.
        """
        with self._use_engine() as engine:
            seqs = self._make_sequences(prompts, sampling_params)
            stream = self._stream(seqs)
            next(stream)  # one that hasn't begun would not get to its `finally`
            engine.add_batch(seqs)
        return stream

    def _stream(self, seqs: list[Sequence]) -> Iterator[Any]:
        """Nothing first, then the increments."""
        running = {seq: i for i, seq in enumerate(seqs)}
        with self._own(seqs):
            yield
            while running:
                yield from self._increments(running)

    def _increments(self, running: dict[Sequence, int]) -> list[RequestOutput]:
        """What is new of some sequences, after a step if nothing is: others may have stepped. Takes
        those that have ended out of `running`."""
        outputs = []
        with self._use_engine() as engine:
            while not (news := [seq for seq in running if seq.finished or seq.has_undelivered]):
                engine.step()
            for seq in news:
                if seq.finish_reason != "abort":
                    output = self._output(seq, delta=True)
                    output.index = running[seq]
                    outputs.append(output)
                if seq.finished:
                    del running[seq]
                engine.advanced.pop(seq, None)
        return outputs

    # One step at a time

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
    ) -> str:
        """Queue one request; step() runs it.

        Args:
            prompt, sampling_params: as for generate.
            request_id: of your own choice, not one that is unfinished; None: a number.

        Returns: the request's id.
        """
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise TypeError(f"request_id must be a string that is not empty, got {request_id!r}")
        prompt = prompts.plain(prompt)
        if not (prompts.is_single(prompt) or prompt in ([], ())):
            raise TypeError(f"add_request takes one prompt, generate lists; got {prompt!r:.80}")
        if not isinstance(sampling_params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {sampling_params!r:.80}")
        with self._use_engine() as engine:
            if request_id is not None and engine.has_request(request_id):
                raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
            [seq] = self._make_sequences([prompt], sampling_params, request_id)
            engine.add(seq)
        return seq.request_id

    def step(self) -> list[RequestOutput]:
        """Run one round of the engine. Returns the outputs of the requests that got a token, each
        as its output_kind says; may be empty while there is more to do."""
        with self._use_engine() as engine:
            engine.step()
            outputs = [
                self._output(seq, delta=seq.params.output_kind is RequestOutputKind.DELTA)
                for seq in engine.advanced
                if seq not in self._owned
                and (seq.finished or seq.params.output_kind is not RequestOutputKind.FINAL_ONLY)
            ]
            engine.advanced.clear()
            return outputs

    def abort(self, request_id: str) -> None:
        """End a request without an output; one that has ended or is unknown is left alone."""
        with self._use_engine() as engine:
            if request_id in engine.unfinished:
                engine.abort([engine.unfinished[request_id]])

    def is_finished(self) -> bool:
        """Whether no request is unfinished and step() has nothing more to give."""
        with self._use_engine() as engine:
            return not engine.has_unfinished

    @property
    def llm_engine(self) -> Engine:
        """The engine inside, for those who watch it: its scheduler, its pages, its metrics."""
        with self._use_engine() as engine:
            return engine

    # Its state

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted up to now: metrics.Counter, Gauge and Histogram, under
        vLLM's names where it has them."""
        with self._use_engine() as engine:
            return read_metrics(engine, {"model_name": self.config.model})

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget the prefix cache. Returns whether that was done: not while pages are in use,
        unless running requests may compute all of their tokens again."""
        with self._use_engine() as engine:
            return engine.reset_prefix_cache(reset_running_requests)

    def sleep(self, level: int = 1) -> None:
        """Give back the memory of the weights and the KV cache, until wake_up.

        Args:
            level: 1 keeps the weights in the CPU's memory; 2 doesn't, wake_up loads them again.

        Raises:
            ValueError: another level.
            RuntimeError: there are unfinished requests.
        """
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level!r}")
        with self._use_engine() as engine:
            if engine.unfinished:
                raise RuntimeError(
                    f"{len(engine.unfinished)} requests are unfinished: let them end, or abort "
                    f"them, before sleep"
                )
            engine.reset_prefix_cache(reset_running_requests=True)  # of steps in flight too
            engine.executor.sleep(level)

    def wake_up(self, tags: list[str] | None = None) -> None:
        """End the sleep; with what was lost loaded anew, and an empty cache.

        Args:
            tags: of "weights" and "kv_cache" which; None: both. Requests need both.

        Raises:
            ValueError: other tags.
            RuntimeError: memory is too small; then all sleeps on.
        """
        tags = list(PARTS) if tags is None else tags
        if not isinstance(tags, list) or not set(tags) <= set(PARTS):
            raise ValueError(f"tags must be a list of {' and '.join(map(repr, PARTS))}, got {tags}")
        with self._use_engine() as engine:
            engine.executor.wake_up(tags)

    def is_sleeping(self) -> bool:
        """Whether weights or cache have no memory now."""
        with self._use_engine() as engine:
            return bool(engine.executor.sleeping)

    # What the checkpoint brings

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers'). Raises ValueError after
        skip_tokenizer_init=True."""
        if self._checkpoint.tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init=True")
        return self._checkpoint.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config recommends."""
        return copy.copy(self._checkpoint.default_sampling_params)

    # The end

    def close(self) -> None:
        """Free the model's and the cache's memory; unfinished requests are gone. Later calls raise
        RuntimeError."""
        with self._lock:
            if self._engine is not None:
                executor = self._engine.executor
                self._engine = None
                executor.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _use_engine(self) -> Iterator[Engine]:
        """The engine for one thread at a time; others wait. It is closed if it can't go on after an
        error."""
        with self._lock:
            if self._engine is None:
                raise RuntimeError(self._why_closed)
            try:
                yield self._engine
            except RuntimeError as error:
                if self._engine is not None and not self._engine.executor.is_usable():
                    self._why_closed = (
                        f"this LLM is closed: its GPU failed, and can't be used any more in this "
                        f"process ({error}); start another one"
                    )
                    self.close()
                raise

    def _make_sequences(
        self,
        prompt_list: Any,
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        request_id: str | None = None,
    ) -> list[Sequence]:
        """Checked sequences for all prompts, or an error before any is made."""
        self._check_awake()
        tokenized = prompts.normalize(
            prompt_list,
            self._checkpoint.tokenizer,
            self.model_config.vocab_size,
            self.max_model_len,
            request_id,
        )
        if sampling_params is None:
            sampling_params = self._checkpoint.default_sampling_params
        params = prompts.match_params(sampling_params, len(tokenized))
        for p in {id(p): p for p in params}.values():  # one may serve all prompts
            self._check_stop(p)
            prompts.bind_params(p, self.model_config.vocab_size, self._checkpoint.tokenizer)
        now = time.monotonic()
        eos_token_ids = self._checkpoint.eos_token_ids
        seqs = []
        for prompt, p in zip(tokenized, params, strict=True):
            number = self._num_requests
            self._num_requests += 1
            seqs.append(
                Sequence(
                    request_id or self._free_id(number),
                    prompt.token_ids,
                    p,
                    seed=_sequence_seed(p.seed, self.config.seed, number),
                    max_model_len=self.max_model_len,
                    eos_token_ids=eos_token_ids,
                    prompt=prompt.text,
                    arrival_time=now,
                )
            )
        return seqs

    def _check_awake(self) -> None:
        if self.is_sleeping():
            raise RuntimeError("this LLM sleeps: call wake_up() first")

    def _check_stop(self, params: SamplingParams) -> None:
        if params.stop and self._detokenizer is None:
            raise ValueError(
                "stop needs a tokenizer: after skip_tokenizer_init=True there is stop_token_ids"
            )

    def _free_id(self, number: int) -> str:
        request_id = str(number)
        while self._engine and self._engine.has_request(request_id):  # somebody chose our number
            request_id += "'"
        return request_id

    def _output(self, seq: Sequence, delta: bool = False) -> RequestOutput:
        """What a request has so far, or only what is new since the last such call."""
        text = self._detokenizer.text(seq) if self._detokenizer else ""
        token_ids = seq.output_token_ids
        logprobs: SequenceOf[dict[int, Logprob]] | None = None
        prompt_logprobs: SequenceOf[dict[int, Logprob] | None] | None = None
        cumulative = None
        if seq.logprobs is not None:  # as they are now
            logprobs = seq.logprobs.copy(self._token_text(seq))
            cumulative = seq.logprobs.cumulative
        if seq.scores is not None:
            prompt_logprobs = PromptLogprobs(seq.scores.copy(self._token_text(seq)))
        if delta:
            num_tokens, num_characters = seq.delivered
            if num_tokens and prompt_logprobs:
                prompt_logprobs = []  # they were in the first
            seq.delivered = len(token_ids), len(text)
            text, token_ids = text[num_characters:], token_ids[num_tokens:]
            logprobs = logprobs and logprobs[num_tokens:]
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=token_ids,
            cumulative_logprob=cumulative,
            logprobs=logprobs,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens].tolist(),
            prompt_logprobs=prompt_logprobs,
            outputs=[completion],
            finished=seq.finished,
            metrics=replace(seq.metrics),
            num_cached_tokens=seq.num_cached_tokens or 0,
        )

    def _token_text(self, seq: Sequence) -> Callable[[list[int]], str] | None:
        tokenizer = self._checkpoint.tokenizer
        return tokenizer.decode if tokenizer is not None and seq.params.detokenize else None


@contextmanager
def _no_collections() -> Iterator[None]:
    """Garbage collections wait: a new batch sets them off, and they look at all its tokens."""
    if not gc.isenabled():  # the user's choice, or another thread will enable them
        yield
        return
    try:
        gc.disable()
        yield
    finally:
        gc.enable()


class _Progress:
    """A bar of requests done, with the tokens per second of prefill and decode."""

    def __init__(self, num_requests: int, metrics: EngineMetrics, disable: bool):
        self.metrics = metrics
        self.start = self.shown = time.monotonic()
        self.prefill, self.decode = metrics.prefill_tokens, metrics.decode_tokens
        self.bar = tqdm(
            total=num_requests, desc="Processed prompts", disable=disable, dynamic_ncols=True
        )

    def show(self, num_finished: int) -> None:
        now = time.monotonic()
        if self.bar.disable or (now - self.shown < 0.1 and num_finished < self.bar.total):
            return
        self.shown = now
        seconds = max(now - self.start, 1e-9)  # a coarse clock may stand still
        prefill = (self.metrics.prefill_tokens - self.prefill) / seconds
        decode = (self.metrics.decode_tokens - self.decode) / seconds
        self.bar.n = num_finished
        self.bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s")

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _sequence_seed(seed: int | None, engine_seed: int, request_number: int) -> int:
    """64 bits: from the request's seed and the index of the sample in it, or from the engine's seed
    and the request's number."""
    origin = f"engine {engine_seed} {request_number}" if seed is None else f"request {seed}"
    return xxh3_64_intdigest(f"{origin} sample 0".encode())
