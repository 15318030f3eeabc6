"""LLM, what users import: prompts in, RequestOutputs out. The one place that wires engine to
worker.

requests.py checks and tokenizes in the caller's thread; the engine's thread decides what runs when,
has the worker compute it and makes the outputs (clients.py).
"""

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as SequenceOf
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tqdm.auto import tqdm

from nanovllm.config import UNSUPPORTED_METHODS, EngineConfig, options_of
from nanovllm.core.metrics import Metric
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.metrics_reader import read_metrics
from nanovllm.engine.policy import Policy, Priority
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.thread import EngineThread, take
from nanovllm.frontend import chat, prompts, scoring, tokenization
from nanovllm.frontend.beam_search import BeamSearchOutput, beam_search
from nanovllm.frontend.clients import Batch, ByHand, Stream, Wait
from nanovllm.frontend.progress import Progress
from nanovllm.frontend.requests import Requests, batch_order
from nanovllm.models import model_class
from nanovllm.models.checkpoint import read_checkpoint
from nanovllm.ops import platform
from nanovllm.outputs import Loglikelihood, RequestOutput, SampleLogprobs
from nanovllm.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from nanovllm.worker.executor import InProcessExecutor
from nanovllm.worker.profiling import Profiler
from nanovllm.worker.worker import PARTS

logger = logging.getLogger(__name__)

Prompt = str | list[int] | Mapping[str, Any]  # TextPrompt or TokensPrompt
PromptType = Prompt  # vLLM's name
Prompts = Prompt | SequenceOf[Prompt]
Message = dict[str, Any]
Conversations = SequenceOf[Message] | SequenceOf[SequenceOf[Message]]
Params = SamplingParams | SequenceOf[SamplingParams] | None
Pair = tuple[str, str] | tuple[list[int], list[int]]
Bar = bool | Callable[..., tqdm]
Output = TypeVar("Output")


class LLM:
    """A language model that generates text for batches of prompts.

    Args:
        model: a folder in Hugging Face's format, or a name on the hub.
        scheduler: a scheduling policy of your own (engine/policy.py), in place of
            scheduling_policy's; an object, or a class that is made without arguments.
        options: vLLM's; see config.EngineConfig.

    Raises:
        ValueError, TypeError: an option, the checkpoint or the memory won't do; the message says
        why and what would.

    Example:
        >>> llm = LLM("assets/tiny-qwen3")
        >>> llm.generate("In the beginning", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str, scheduler: Policy | type[Policy] | None = None, **options: Any):
        self.config = config = EngineConfig.from_options(model, **options)
        self._chat_template = chat.load_template(config.chat_template)
        self._profiler: Profiler | None = None
        if scheduler is None and config.scheduling_policy == "priority":
            scheduler = Priority
        self._takes_priority = scheduler is not None
        device = platform.resolve_device(config.device)
        self._checkpoint = read_checkpoint(config)
        self.model_config = self._checkpoint.model_config
        model_class(self.model_config.architecture)  # before weights are fetched or read
        tokenizer = self._checkpoint.tokenizer
        detokenizer = Detokenizer(tokenizer) if tokenizer is not None else None

        max_num_seqs, max_num_batched_tokens = platform.batch_limits(
            config.max_num_seqs, config.max_num_batched_tokens, device
        )
        overlaps = config.async_scheduling
        if overlaps is None:
            overlaps = device.type == "cuda"

        def make() -> tuple[Engine, ByHand]:
            executor = InProcessExecutor(
                config, self.model_config, device, max_num_seqs, max_num_batched_tokens,
                self._checkpoint.recommends_limits,
            )  # fmt: skip
            engine = Engine(
                executor,
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max_num_batched_tokens,
                enable_prefix_caching=config.enable_prefix_caching is not False,
                policy=scheduler() if isinstance(scheduler, type) else scheduler,
                # On a CPU there is nothing to overlap with: the worker computes in submit.
                depth=2 if overlaps else 1,
                detokenizer=detokenizer,
            )
            self.max_model_len = executor.max_model_len
            self.model_config = replace(self.model_config, max_model_len=executor.max_model_len)
            self._requests = Requests(
                self._checkpoint, detokenizer, executor.max_model_len, config.seed
            )
            self._metrics = engine.metrics
            self._by_hand = ByHand(self._requests)
            logger.info("%s on %s", self.model_config.architecture, executor.description)
            return engine, self._by_hand

        self._thread = EngineThread(
            make,
            survives_fork=device.type == "cpu",
            get_num_threads=torch.get_num_threads,
            set_num_threads=torch.set_num_threads,
        )
        # When the last reference to the LLM is gone, or at the end of the process.
        self._finalizer = weakref.finalize(self, self._thread.close)

    @classmethod
    def from_engine_args(cls, engine_args: Any) -> "LLM":
        """From an EngineArgs, ours or vLLM's, or any object whose attributes are options."""
        return cls(**options_of(engine_args))

    # Whole batches

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        use_tqdm: Bar = True,
        lora_request: None = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[RequestOutput]:
        """Generate for every prompt, and wait.

        Args:
            prompts: a text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}, or
                a list of these.
            sampling_params: one for all, or one each; None: the checkpoint's generation_config.
            use_tqdm: show a progress bar; or what makes it, called as tqdm.
            priority: a number for each prompt, with scheduling_policy="priority"; lower runs first.
            tokenization_kwargs: how texts become tokens; see tokenization.Cutter.
            lora_request, mm_processor_kwargs: vLLM's, not supported.

        Returns: an output for each prompt, in the order of the prompts. A request that an error of
            its own ends has the finish_reason "error"; a warning gives their number.

        Raises:
            ValueError, TypeError: a prompt or parameter won't do; then none has run.
            other errors: a step failed, with what it raised.
        """
        self._refuse(lora_request, priority, mm_processor_kwargs)
        if tokenization_kwargs:
            prompts = self._tokenized(prompts, tokenization_kwargs)
        outputs = self._run(
            lambda: self._requests.make(prompts, sampling_params, priority),
            self._requests.output,
            use_tqdm,
        )
        _warn_of_errors(outputs)
        return outputs

    def chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        use_tqdm: Bar = True,
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
            chat_template: a Jinja template; None: the constructor's, else the checkpoint's.
            chat_template_content_format: what the template gets as a content: "string", one text,
                its parts as lines; "openai", a list of parts; "auto": parts if the template loops
                over them, else a text.
            add_generation_prompt: begin the answer's message.
            continue_final_message: go on with the last message instead.
            tools: functions that the template tells the model of, as JSON schemas.
            chat_template_kwargs: what else the template reads.

        Other arguments, outputs and errors are generate's.
        """
        self._refuse(lora_request, None, mm_processor_kwargs)
        prompts = self.render_chat(
            messages,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
            tokenization_kwargs=tokenization_kwargs,
        )
        return self.generate(prompts, sampling_params, use_tqdm)

    def render_chat(
        self,
        messages: Conversations,
        *,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[dict[str, Any]]:
        """The prompts that chat makes of conversations, for stream, add_request and the rest. Ours;
        arguments and errors are chat's."""
        options = {
            "chat_template": chat_template or self._chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            **(chat_template_kwargs or {}),
        }
        tokenizer, encode = self.get_tokenizer(), None
        if tokenization_kwargs:
            encode = tokenization.Cutter(tokenizer, self.max_model_len, tokenization_kwargs)
        return chat.render(
            messages, tokenizer, options, chat_template_content_format, self.max_model_len, encode
        )

    def beam_search(
        self,
        prompts: Prompts,
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The most likely continuations of every prompt that a beam search finds.

        Args:
            prompts: as for generate.
            params: how wide and how long.
            use_tqdm: show a bar of tokens, up to max_tokens.
            concurrency_limit: prompts at a time; None: all.

        Returns: an output for each prompt, in their order. Errors are generate's; and RuntimeError
            for a request that an error of its own ends.
        """
        self._refuse(lora_request)

        def run(beams: list[list[int]], own: Params) -> list[SampleLogprobs]:
            seqs = self._run(lambda: self._requests.make(beams, own), itemgetter(0), False)
            _raise_errors(seqs)
            return [seq.logprobs for seq in seqs]

        return beam_search(run, self._requests, prompts, params, use_tqdm, concurrency_limit)

    def loglikelihood(self, pairs: SequenceOf[Pair], use_tqdm: bool = True) -> list[Loglikelihood]:
        """Score given continuations of contexts. Equal contexts are computed once.

        Args:
            pairs: a list of (context, continuation), two texts or two lists of token ids. Both
                together may have max_model_len + 1 tokens. An empty context is BOS, or else EOS.
            use_tqdm: show a progress bar.

        Returns: for each pair, what the model says of the continuation's tokens.

        Raises:
            ValueError, TypeError: a pair won't do; then none has run.
            RuntimeError: an error ended a request, when the others are done.
        """
        return self._score(scoring.from_pairs(pairs, *self._scoring_limits), use_tqdm)

    def loglikelihood_rolling(self, texts: Prompts, use_tqdm: bool = True) -> list[Loglikelihood]:
        """Score whole texts of any length, by windows of max_model_len tokens; each is scored by
        itself, beginning after BOS, or else EOS.

        Args:
            texts: as the prompts of generate.
            use_tqdm: show a progress bar.

        Returns: for each text, what the model says of its tokens.

        Raises: as loglikelihood.
        """
        windows = scoring.from_texts(texts, *self._scoring_limits)
        parts = iter(self._score([part for text in windows for part in text], use_tqdm))
        return [scoring.join(islice(parts, len(text))) for text in windows]

    @property
    def _scoring_limits(self) -> tuple[Any, int, int]:
        return self._checkpoint.tokenizer, self.model_config.vocab_size, self.max_model_len

    def _score(self, scored: list[scoring.Scored], use_tqdm: bool) -> list[Loglikelihood]:
        seqs: list[Sequence] = self._run(
            lambda: self._requests.make_scored(scored), itemgetter(0), use_tqdm
        )
        _raise_errors(seqs)
        return [scoring.read(seq.scores) for seq in seqs if seq.scores is not None]

    def enqueue(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        lora_request: None = None,
        priority: list[int] | None = None,
        use_tqdm: Bar = True,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
    ) -> list[str]:
        """Queue requests for wait_for_completion; arguments and errors are generate's, there is no
        progress to show here. Returns their ids."""
        self._refuse(lora_request, priority, mm_processor_kwargs)
        if tokenization_kwargs:
            prompts = self._tokenized(prompts, tokenization_kwargs)
        seqs = self._requests.make(
            prompts, sampling_params, priority, output_kind=RequestOutputKind.FINAL_ONLY
        )
        by_hand = self._by_hand
        self._add_by_hand(seqs, lambda: by_hand.completed.update(dict.fromkeys(_ids(seqs))))
        return _ids(seqs)

    def enqueue_chat(
        self,
        messages: Conversations,
        sampling_params: Params = None,
        use_tqdm: Bar = True,
        lora_request: None = None,
        priority: list[int] | None = None,
        *,
        tokenization_kwargs: dict[str, Any] | None = None,
        mm_processor_kwargs: None = None,
        **template_options: Any,
    ) -> list[str]:
        """As enqueue, for conversations; template_options are render_chat's."""
        prompts = self.render_chat(
            messages, tokenization_kwargs=tokenization_kwargs, **template_options
        )
        return self.enqueue(
            prompts,
            sampling_params,
            lora_request,
            priority,
            mm_processor_kwargs=mm_processor_kwargs,
        )

    def wait_for_completion(
        self,
        output_type: type[RequestOutput] | None = None,
        *,
        use_tqdm: Bar = True,
    ) -> list[RequestOutput]:
        """Run until all requests of enqueue and add_request have ended. An interrupt loses none: a
        later call goes on.

        Returns: the outputs of enqueue's requests, in their order, then of add_request's. An
            aborted request has none.
        """
        if output_type not in (None, RequestOutput):
            raise ValueError(f"output_type must be RequestOutput, got {output_type!r}")
        thread, by_hand, wait = self._thread, self._by_hand, Wait(shows=bool(use_tqdm))

        def start(_: Engine) -> None:
            by_hand.waits[wait] = None
            if by_hand.seqs:
                thread.driving[by_hand] = None
            by_hand.advance([])

        def stop(_: Engine) -> None:
            by_hand.waits.pop(wait, None)
            if not by_hand.waits:
                thread.driving.pop(by_hand, None)

        make = use_tqdm if callable(use_tqdm) else tqdm
        total = len(by_hand.completed)
        with make(total=total, desc="Processed prompts", disable=not use_tqdm) as bar:
            try:
                thread.post(start, wait.answer)
                wait.until_over(lambda num_done: bar.update(num_done - bar.n))
            finally:
                thread.post(stop, starts=False)
        completed = thread.call(by_hand.take_completed, undo=by_hand.completed.update)
        outputs = [output for output in completed.values() if output is not None]
        _warn_of_errors(outputs)
        return outputs

    # As it comes

    def stream(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
    ) -> Iterator[RequestOutput]:
        """Generate for every prompt, and hand out each token as it comes.

        The requests are queued by this call. Unfinished requests are aborted when the iterator is
        closed or dropped (by `break`, by an exception).

        Args:
            prompts, sampling_params: as for generate.

        Returns: an iterator over outputs of what is new, as of RequestOutputKind.DELTA; `index`
            says of which prompt, that of a completion of which sample. A text never ends inside a
            character; it may be empty.

        Raises:
            ValueError, TypeError: a prompt or parameter won't do; then none has run.
        """
        seqs = self._requests.make(prompts, sampling_params, output_kind=RequestOutputKind.DELTA)
        outbox: SimpleQueue[list[RequestOutput] | BaseException] = SimpleQueue()
        client, thread = Stream(self._requests, outbox.put), self._thread
        stream = self._increments(client, seqs, outbox)
        next(stream)  # a generator that has not begun would not get to its `finally`
        thread.call(lambda _: thread.add(client, seqs))
        return stream

    def _increments(
        self, client: Stream, seqs: list[Sequence], outbox: SimpleQueue
    ) -> Iterator[Any]:
        """Nothing first, then the outputs; at its end the requests that are left are aborted."""
        thread = self._thread
        try:
            yield
            numbers = {request_id: i for i, request_id in enumerate(_ids(seqs))}
            while numbers:
                outputs = take(outbox)
                if isinstance(outputs, BaseException):
                    raise outputs
                for output in outputs:
                    output.index = numbers[output.request_id]
                    client.untaken.discard(output.request_id)
                    if output.finished:
                        del numbers[output.request_id]
                    yield output
        finally:
            thread.post(lambda _: thread.drop(client, seqs), starts=False)

    # One step at a time

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        priority: int = 0,
        *,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """Queue one request; step() runs it.

        Args:
            prompt, sampling_params, priority, tokenization_kwargs, lora_request: as for generate.
            request_id: of your own choice, not one that is unfinished; None: a number.

        Returns: the request's id.
        """
        self._refuse(lora_request, priority)
        seqs = self._make_one(prompt, sampling_params, request_id, priority, tokenization_kwargs)
        self._add_by_hand(seqs, lambda: None, own_id=request_id is not None)
        return seqs[0].request_id

    def _make_one(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None,
        request_id: str | None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[Sequence]:
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise TypeError(f"request_id must be a string that is not empty, got {request_id!r}")
        prompt = prompts.plain(prompt)
        if not (prompts.is_single(prompt) or prompt in ([], ())):
            raise TypeError(f"add_request takes one prompt, generate lists; got {prompt!r:.80}")
        if not isinstance(sampling_params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {sampling_params!r:.80}")
        if tokenization_kwargs:
            [prompt] = self._tokenized([prompt], tokenization_kwargs)
        return self._requests.make([prompt], sampling_params, [priority], request_id)

    def _add_by_hand(
        self, seqs: list[Sequence], and_then: Callable[[], None], own_id: bool = False
    ) -> None:
        thread, by_hand = self._thread, self._by_hand

        def add(engine: Engine) -> None:
            thread.add(by_hand, batch_order(seqs, engine.scheduler), own_id)
            and_then()

        thread.call(add, undo=lambda _: thread.drop(by_hand, seqs))

    def step(self) -> list[RequestOutput]:
        """Run one round of the engine. Returns the outputs of the requests that have news, one for
        each, as its output_kind says; may be empty while there is more to do. A request that an
        error of its own ends has the finish_reason "error". Raises what a failed step raises; the
        news come with the next call."""
        thread, by_hand = self._thread, self._by_hand

        def run(_: Engine) -> list[RequestOutput]:
            if (error := thread.round()) is not None:
                raise error
            return by_hand.take()

        return thread.call(run, undo=by_hand.put_back)

    def abort(self, request_id: str) -> None:
        """End a request without an output; one that has ended or is unknown is left alone."""
        thread = self._thread
        thread.call(lambda _: thread.abort(request_id))

    def is_finished(self) -> bool:
        """Whether no request is unfinished and step() has nothing more to give."""
        by_hand = self._by_hand
        return self._thread.call(
            lambda engine: not (engine.has_unfinished or by_hand.news or by_hand.kept)
        )

    @property
    def llm_engine(self) -> Engine:
        """The engine inside, to be watched: its scheduler, its blocks, its metrics."""
        return self._thread.call(lambda engine: engine)

    # A look inside

    def apply_model(self, func: Callable[[Any], Any]) -> list[Any]:
        """Call a function with the model (a torch.nn.Module; weights that we pack have other names
        than vLLM's), in the engine's thread, between two steps. Returns its result, in a list of
        one: there is one worker."""
        return self._thread.call(lambda engine: engine.executor.apply_model(func))

    def get_world_size(self, include_dp: bool = True) -> int:
        """How many GPUs, or CPU workers, the model is spread over."""
        return self.config.tensor_parallel_size

    def start_profile(self, profile_prefix: str | None = None) -> None:
        """Have torch's profiler watch, until stop_profile writes PREFIX.pt.trace.json.gz into
        profiler_config's folder. Raises ValueError without profiler_config."""
        self._profiler = profiler = self._profiler or Profiler(self.config)
        self._thread.call(lambda _: profiler.start(profile_prefix))

    def stop_profile(self) -> None:
        """Write the profile. Raises RuntimeError if none is being taken."""
        profiler = self._profiler
        if profiler is None:
            raise RuntimeError("no profile is being taken: start_profile begins one")
        self._thread.call(lambda _: profiler.stop())

    if not TYPE_CHECKING:  # mypy would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name in UNSUPPORTED_METHODS:
                raise AttributeError(
                    f"vLLM's LLM.{name} is not supported: {UNSUPPORTED_METHODS[name]}"
                )
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    # Its state

    def get_metrics(self) -> list[Metric]:
        """What the engine has counted up to now: metrics.Counter, Gauge and Histogram, under
        vLLM's names where it has them."""
        labels = {"model_name": self.config.model}
        return self._thread.call(lambda engine: read_metrics(engine, labels))

    def do_log_stats(self) -> None:
        """Log what runs and waits, at the level INFO."""
        values = {metric.name: getattr(metric, "value", 0) for metric in self.get_metrics()}
        logger.info(
            "running: %d requests, waiting: %d requests, KV cache: %.1f%% used, generated so far: "
            "%d tokens",
            values["vllm:num_requests_running"], values["vllm:num_requests_waiting"],
            100 * values["vllm:kv_cache_usage_perc"], values["vllm:generation_tokens"],
        )  # fmt: skip

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> bool:
        """Forget the prefix cache. Returns whether that was done: not while blocks are in use,
        unless running requests may compute all of their tokens again."""
        return self._thread.call(lambda engine: engine.reset_prefix_cache(reset_running_requests))

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

        def sleep(engine: Engine) -> None:
            if engine.unfinished:
                raise RuntimeError(
                    f"{len(engine.unfinished)} requests are unfinished: let them end, or abort "
                    f"them, before sleep"
                )
            engine.reset_prefix_cache(reset_running_requests=True)  # of steps in flight too
            engine.executor.sleep(level)

        self._thread.call(sleep)

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
        self._thread.call(lambda engine: engine.executor.wake_up(tags))

    def is_sleeping(self) -> bool:
        """Whether weights or cache have no memory now."""
        return self._thread.call(lambda engine: bool(engine.executor.sleeping))

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
        RuntimeError; so does this one if a step calls it."""
        self._thread.refuse_own_call()
        self._thread.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tokenized(self, prompts: Any, kwargs: dict[str, Any]) -> Any:
        tokenizer, vocab_size = self._checkpoint.tokenizer, self.model_config.vocab_size
        return tokenization.tokenize(prompts, tokenizer, vocab_size, self.max_model_len, kwargs)

    def _run(
        self,
        make: Callable[[], list[Sequence]],
        read: Callable[[list[Sequence]], Output],
        use_tqdm: Bar,
    ) -> list[Output]:
        """Run the sequences that `make` makes to their ends. Returns what `read` makes of the
        samples of each request. However the call ends, Ctrl-C too, nothing of them stays."""
        # A new batch sets off garbage collections, which look at all its tokens: not before the
        # first step. Unless that is the user's choice, or another thread will enable them.
        resume = gc.enable if gc.isenabled() else lambda: None
        gc.disable()
        thread = self._thread
        try:
            seqs = make()
            batch = Batch(seqs, read, shows=bool(use_tqdm), on_step=resume)
            shown = Progress(len(batch.requests), self._metrics, use_tqdm) if use_tqdm else None
            with shown or nullcontext():
                try:
                    thread.post(
                        lambda engine: thread.add(batch, batch_order(seqs, engine.scheduler)),
                        batch.wait.answer,
                    )
                    batch.wait.until_over(shown.show if shown else None)
                finally:
                    if not batch.wait.is_over:
                        thread.post(lambda _: thread.drop(batch, seqs), starts=False)
        finally:
            resume()
        return [batch.outputs[seq] for seq in batch.requests]

    def _refuse(
        self, lora_request: Any = None, priority: Any = None, mm_processor_kwargs: Any = None
    ) -> None:
        """Refuse vLLM's arguments without an implementation, or without the option they need, where
        they ask for something."""
        if _asks(lora_request):
            raise ValueError("lora_request is not supported yet: leave it out")
        if _asks(priority) and not self._takes_priority:
            raise ValueError(
                "priority is not supported by the policy 'fcfs': give scheduling_policy='priority'"
            )
        if _asks(mm_processor_kwargs):
            raise ValueError("mm_processor_kwargs is not supported: prompts are text alone")


def _asks(value: Any) -> bool:
    """Whether an argument asks for something: not None or 0, nor a list of these."""
    return any(value) if isinstance(value, list | tuple) else bool(value)


def _ids(seqs: list[Sequence]) -> list[str]:
    """The requests of sequences, in their order."""
    return [seq.request_id for seq in seqs if seq.index == 0]


def _warn_of_errors(outputs: list[RequestOutput]) -> None:
    failed = [o for o in outputs if any(c.finish_reason == "error" for c in o.outputs)]
    if failed:
        logger.warning(
            "%d of %d requests ended with the finish_reason 'error'; the first: %s",
            len(failed), len(outputs), failed[0].error,
        )  # fmt: skip


def _raise_errors(seqs: list[Sequence]) -> None:
    if errors := [seq.error for seq in seqs if seq.error]:
        raise RuntimeError(f"{len(errors)} of {len(seqs)} requests failed; the first: {errors[0]}")
