"""LLM, what users import: prompts in, RequestOutputs out. The one place that wires engine to
worker.

It tokenizes and checks requests; the engine decides what runs when; the worker computes.
"""

import copy
import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm.auto import tqdm
from xxhash import xxh3_64_intdigest

from nanovllm import chat, platform, prompts, scoring, tokenization
from nanovllm.checkpoint import read_checkpoint
from nanovllm.config import EngineConfig
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.metrics import EngineMetrics
from nanovllm.models import model_class
from nanovllm.outputs import (
    CompletionOutput,
    Loglikelihood,
    Logprob,
    PromptLogprobs,
    RequestOutput,
)
from nanovllm.profiling import Profiler
from nanovllm.sampling_params import RequestOutputKind, SamplingParams
from nanovllm.structured_outputs import GrammarCompiler
from nanovllm.vllm_options import UNSUPPORTED_METHODS
from nanovllm.worker.executor import InProcessExecutor

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
        self._lock = threading.RLock()
        self.config = config = EngineConfig.from_options(model, **options)
        self._chat_template = chat.load_template(config.chat_template)
        self._profiler: Profiler | None = None
        # Of enqueue, in its order; None: not finished, or step gave it to somebody else.
        self._completed: dict[str, RequestOutput | None] = {}
        device = platform.resolve_device(config.device)
        self._checkpoint = read_checkpoint(config)
        self.model_config = self._checkpoint.model_config
        model_class(self.model_config.architecture)  # before weights are fetched or read
        tokenizer = self._checkpoint.tokenizer
        self._detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None
        self._grammars = GrammarCompiler(
            tokenizer, self.model_config.vocab_size, self._checkpoint.eos_token_ids
        )
        self._num_requests = 0
        self._streamed: set[Sequence] = set()  # stream hands these out, step doesn't

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

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> "LLM":
        """From an object whose attributes are options, as of vLLM's EngineArgs."""
        return cls(**{k: v for k, v in vars(engine_args).items() if not k.startswith("_")})

    # Whole batches

    def generate(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        priority: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, and wait.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or
                a list of those.
            sampling_params: one for all, or one each; None: the checkpoint's generation_config.
            use_tqdm: show a progress bar; or what makes it, called as tqdm.
            tokenization_kwargs: how texts become tokens; see tokenization.tokenize.
            lora_request, priority, mm_processor_kwargs: vLLM's, not supported.

        Returns: an output for each prompt, in the order of the prompts.

        Raises:
            ValueError, TypeError: a prompt or parameter won't do; then none has run.
            RuntimeError: a logits processor raised, or a grammar became too large; from its error.
        """
        _refuse(lora_request, priority, mm_processor_kwargs)
        prompts = self._tokenized(prompts, tokenization_kwargs)
        with self._use_engine() as engine, ExitStack() as first_step:
            first_step.enter_context(_no_collections())
            seqs = self._make_sequences(prompts, sampling_params)
            return self._run(engine, seqs, use_tqdm, self._output, on_step=first_step.close)

    def chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generate the next message of every conversation, and wait.

        Args:
            messages: a conversation, that is a list of {"role": ..., "content": ...}, or a list of
                conversations.
            sampling_params, use_tqdm: as for generate.
            chat_template: a Jinja template; None: the constructor's, else the checkpoint's.
            chat_template_content_format: "auto" or "string": a content of several parts is joined
                to one text.
            add_generation_prompt: begin the answer's message.
            continue_final_message: go on with the last message instead.
            tools: functions that the template tells the model of, as JSON schemas.
            chat_template_kwargs: what else the template reads.
            tokenization_kwargs: as for generate.
            lora_request, mm_processor_kwargs: vLLM's, not supported.

        Returns: an output for each conversation, in their order.

        Raises:
            ValueError, TypeError: the conversations, or the parameters, won't do; then none has
            run.
        """
        _refuse(lora_request, None, mm_processor_kwargs)
        prompts = self.render_chat(
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.generate(
            prompts, sampling_params, use_tqdm, tokenization_kwargs=tokenization_kwargs
        )

    def render_chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The prompts that chat makes of conversations, for stream, add_request and the rest. Ours;
        arguments and errors are chat's."""
        if chat_template_content_format not in ("auto", "string"):
            raise ValueError(
                f"chat_template_content_format must be 'auto' or 'string', "
                f"got {chat_template_content_format!r}"
            )
        options = {
            "chat_template": chat_template or self._chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        return chat.render(messages, self.get_tokenizer(), options)

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

        with self._use_engine() as engine:
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
            return self._run(engine, seqs, use_tqdm, read)

    def _run(
        self,
        engine: Engine,
        seqs: list[Sequence],
        use_tqdm: bool | Callable[..., tqdm],
        read: Callable[[Sequence], Output],
        on_step: Callable[[], None] = lambda: None,
    ) -> list[Output]:
        """Step until these sequences have ended, and read each; what others get meanwhile waits in
        `advanced`."""
        running, outputs = set(seqs), {}
        try:
            engine.add_batch(seqs)
            with _Progress(len(seqs), engine.metrics, use_tqdm) as progress:
                while running:
                    ended = engine.step()
                    # What follows costs nothing: a GPU runs the next step meanwhile.
                    on_step()  # ends the wait of garbage collections, once
                    for seq in running.intersection(ended):
                        running.remove(seq)
                        outputs[seq] = read(seq)
                    progress.show(num_finished=len(outputs))
        except BaseException:  # Ctrl-C too: nothing of this call stays, others' requests do
            engine.abort(seqs)
            raise
        for seq in seqs:
            engine.advanced.pop(seq, None)
        return [outputs[seq] for seq in seqs]

    def enqueue(
        self,
        prompts: Prompt | SequenceOf[Prompt],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        lora_request: None = None,
        priority: None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """Queue requests for wait_for_completion; arguments and errors are generate's, there is no
        progress to show here. Returns their ids."""
        _refuse(lora_request, priority, mm_processor_kwargs)
        with self._use_engine() as engine:
            prompts = self._tokenized(prompts, tokenization_kwargs)
            seqs = self._make_sequences(prompts, sampling_params)
            for seq in seqs:
                seq.params.output_kind = RequestOutputKind.FINAL_ONLY
            engine.add_batch(seqs)
            request_ids = dict.fromkeys(seq.request_id for seq in seqs)
            self._completed.update(request_ids)
            return list(request_ids)

    def enqueue_chat(
        self,
        messages: SequenceOf[Message] | SequenceOf[SequenceOf[Message]],
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None = None,
        use_tqdm: bool | Callable[..., tqdm] = True,
        lora_request: None = None,
        priority: None = None,
        *,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        **template_options: Any,
    ) -> list[str]:
        """As enqueue, for conversations; template_options are render_chat's."""
        prompts = self.render_chat(messages, **template_options)
        return self.enqueue(
            prompts,
            sampling_params,
            lora_request,
            priority,
            tokenization_kwargs=tokenization_kwargs,
            mm_processor_kwargs=mm_processor_kwargs,
        )

    def wait_for_completion(
        self,
        output_type: type[RequestOutput] | None = None,
        *,
        use_tqdm: bool | Callable[..., tqdm] = True,
    ) -> list[RequestOutput]:
        """Step until all requests have ended. An interrupt loses none: a later call goes on.

        Returns: the outputs of what enqueue queued, in that order, then those of add_request. An
            aborted request has none.
        """
        if output_type not in (None, RequestOutput):
            raise ValueError(f"output_type must be RequestOutput, got {output_type!r}")
        make = use_tqdm if callable(use_tqdm) else tqdm
        total = len(self._completed)
        with make(total=total, desc="Processed prompts", disable=not use_tqdm) as bar:
            while not self.is_finished():
                for output in self.step():
                    if output.finished:
                        self._completed[output.request_id] = output
                        bar.update()
        completed, self._completed = self._completed, {}
        return [output for output in completed.values() if output is not None]

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
        self._streamed.update(seqs)
        try:
            yield
            while running:
                yield from self._increments(running)
        finally:
            with self._lock:
                self._streamed.difference_update(seqs)
                if self._engine is not None:
                    self._engine.abort(seqs)

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
        as its output_kind says; may be empty while there is more to do. Raises RuntimeError for one
        that an error ended, as generate; the others' news come with the next call."""
        with self._use_engine() as engine:
            engine.step()
            news = [
                seq
                for seq in engine.advanced
                if seq not in self._streamed
                and (seq.finished or seq.params.output_kind is not RequestOutputKind.FINAL_ONLY)
            ]
            news.sort(key=lambda seq: seq.error is None)  # raised before anybody's news are taken
            outputs = [
                self._output(seq, delta=seq.params.output_kind is RequestOutputKind.DELTA)
                for seq in news
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

    # A look inside

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the model (a torch.nn.Module; weights that we pack have other names
        than vLLM's). Returns its result, in a list of one: there is one worker."""
        with self._use_engine() as engine:
            return [func(engine.executor.runner.model)]  # type: ignore[attr-defined]

    def get_world_size(self, include_dp: bool = True) -> int:
        """How many GPUs, or CPU workers, the model is spread over."""
        return self.config.tensor_parallel_size

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Have torch's profiler watch, until stop_profile writes PREFIX.pt.trace.json.gz into
        profiler_config's folder. Raises ValueError without profiler_config."""
        self._profiler = self._profiler or Profiler(self.config)
        self._profiler.start(profile_prefix)

    def stop_profile(self) -> None:
        """Write the profile. Raises RuntimeError if none is being taken."""
        if self._profiler is None:
            raise RuntimeError("no profile is being taken: start_profile begins one")
        self._profiler.stop()

    if not TYPE_CHECKING:  # mypy would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name in UNSUPPORTED_METHODS:
                raise AttributeError(
                    f"vLLM's LLM.{name} is not supported: {UNSUPPORTED_METHODS[name]}"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

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
        """The engine for one thread at a time; others wait."""
        with self._lock:
            if self._engine is None:
                raise RuntimeError("this LLM is closed")
            yield self._engine

    def _tokenized(self, prompts: Any, kwargs: dict[str, Any] | None) -> Any:
        if not kwargs:
            return prompts
        tokenizer, vocab_size = self._checkpoint.tokenizer, self.model_config.vocab_size
        return tokenization.tokenize(prompts, tokenizer, vocab_size, self.max_model_len, kwargs)

    def _make_sequences(
        self,
        prompt_list: Any,
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        request_id: str | None = None,
    ) -> list[Sequence]:
        """Checked sequences for all prompts, or an error before any is made."""
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
            if p.structured_outputs is not None:
                p.grammar = self._grammars.compile(p.structured_outputs)
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
        """What a request has so far, or only what is new since the last such call. Raises
        RuntimeError for one that an error ended, and takes its news."""
        if seq.error is not None:
            if self._engine is not None:
                self._engine.advanced.pop(seq, None)
            raise RuntimeError(
                f"request {seq.request_id!r} ended by an error in its logits_processors or its "
                f"structured_outputs after {len(seq.token_ids) - seq.num_prompt_tokens} tokens: "
                f"{seq.error!r}"
            ) from seq.error
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


def _refuse(lora_request: Any, priority: Any, mm_processor_kwargs: Any) -> None:
    """vLLM's arguments that we don't have."""
    if lora_request is not None:
        raise ValueError("lora_request is not supported yet: leave it out")
    if priority is not None:
        raise ValueError("priority is not supported (requests run first come, first served)")
    if mm_processor_kwargs is not None:
        raise ValueError("mm_processor_kwargs is not supported: prompts are text alone")


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

    def __init__(
        self, num_requests: int, metrics: EngineMetrics, use_tqdm: bool | Callable[..., tqdm]
    ):
        self.metrics = metrics
        self.start = self.shown = time.monotonic()
        self.prefill, self.decode = metrics.prefill_tokens, metrics.decode_tokens
        make = use_tqdm if callable(use_tqdm) else tqdm
        self.bar = make(
            total=num_requests, desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True
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
