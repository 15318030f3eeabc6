"""LLM, what users import: prompts in, RequestOutputs out. The one place that wires engine to
worker.

It tokenizes and checks requests; the engine decides what runs when; the worker computes.
"""

import logging
import time
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from nanovllm import checkpoint, platform, prompts
from nanovllm.config import EngineConfig, ModelConfig, token_id_tuple
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.engine import Engine
from nanovllm.engine.sequence import Sequence
from nanovllm.models import model_class
from nanovllm.outputs import CompletionOutput, RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.worker.executor import InProcessExecutor

logger = logging.getLogger(__name__)

Prompt = str | list[int] | dict[str, Any]


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
        self._engine: Engine | None = None  # close() finds it however far construction came
        self.config = config = EngineConfig.from_options(model, **options)
        platform.resolve_device(config.device)
        folder = checkpoint.resolve_folder(config.model, config.revision, with_weights=False)
        hf_config = checkpoint.read_json(folder, "config.json", required=True)
        self.model_config = ModelConfig.from_hf(hf_config)
        model_class(
            self.model_config.architecture
        )  # refuses an unknown one before anything is loaded
        self._generation_config = checkpoint.read_json(
            folder, "generation_config.json", required=False
        )
        self._tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer_folder = folder
            if config.tokenizer is not None:
                tokenizer_folder = checkpoint.resolve_folder(
                    config.tokenizer, None, with_weights=False, option="tokenizer"
                )
            self._tokenizer = checkpoint.load_tokenizer(tokenizer_folder)
        self._detokenizer = Detokenizer(self._tokenizer) if self._tokenizer else None
        self._eos_token_ids = self._find_eos_token_ids()

        if config.load_format != "dummy":
            folder = checkpoint.resolve_folder(config.model, config.revision, with_weights=True)
        max_num_seqs, max_num_batched_tokens = _limits(config)
        executor = InProcessExecutor(config, self.model_config, folder, max_num_seqs)
        plan = executor.runner.plan
        self.max_model_len = plan.max_model_len
        self._engine = Engine(
            executor,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching is not False,
            # On a CPU there is nothing to overlap with: the worker computes in the caller's thread.
            depth=2 if config.async_scheduling else 1,
        )
        self._num_requests = 0
        self._undelivered: list[Sequence] = []  # progress of others' requests during generate
        logger.info(
            "%s on %s in %s, attention TORCH_SDPA; weights %.2f GiB; KV cache of %d tokens in "
            "pages of %d, %.1f requests of %d tokens",
            self.model_config.architecture,
            executor.runner.device,
            str(executor.runner.dtype).removeprefix("torch."),
            executor.runner.weight_bytes / platform.GIB,
            plan.num_tokens,
            plan.block_size,
            plan.num_tokens / plan.max_model_len,
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
        engine = self._open_engine()
        seqs = self._make_sequences(prompts, sampling_params)
        mine = {seq.request_id for seq in seqs}
        try:
            for seq in seqs:
                engine.add(seq)
            with _Progress(len(seqs), engine, disable=not use_tqdm) as progress:
                while not all(seq.finished for seq in seqs):
                    advanced = engine.step()
                    self._undelivered += [s for s in advanced if s.request_id not in mine]
                    progress.show(sum(s.finished and s.request_id in mine for s in advanced))
        except (
            BaseException
        ):  # Ctrl-C too: what others added goes on later, nothing of this call stays
            for seq in seqs:
                engine.abort(seq.request_id)
            raise
        return [self._output(seq) for seq in seqs]

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
        engine = self._open_engine()
        if request_id is not None and not (isinstance(request_id, str) and request_id):
            raise TypeError(f"request_id must be a string that is not empty, got {request_id!r}")
        if request_id in engine.unfinished:
            raise ValueError(f"request_id {request_id!r} is in use by an unfinished request")
        prompt = prompts.plain(prompt)
        if not (prompts.is_single(prompt) or prompt == []):
            raise TypeError(f"add_request takes one prompt, generate lists; got {prompt!r:.80}")
        if not isinstance(sampling_params, SamplingParams | None):
            raise TypeError(f"sampling_params must be SamplingParams, got {sampling_params!r:.80}")
        [seq] = self._make_sequences([prompt], sampling_params, request_id)
        engine.add(seq)
        return seq.request_id

    def step(self) -> list[RequestOutput]:
        """Run one round of the engine. Returns the outputs, so far, of the requests that got a
        token; may be empty while there is more to do."""
        advanced = self._undelivered + self._open_engine().step()
        self._undelivered = []
        return [self._output(seq) for seq in dict.fromkeys(advanced)]

    def abort(self, request_id: str) -> None:
        """End a request without an output; one that has ended or is unknown is left alone."""
        self._open_engine().abort(request_id)
        self._undelivered = [s for s in self._undelivered if s.request_id != request_id]

    def is_finished(self) -> bool:
        """Whether no request is unfinished and step() has nothing more to give."""
        return not (self._open_engine().has_unfinished or self._undelivered)

    # What the checkpoint brings

    def get_tokenizer(self) -> Any:
        """The checkpoint's tokenizer (transformers'). Raises ValueError after
        skip_tokenizer_init=True."""
        if self._tokenizer is None:
            raise ValueError("there is no tokenizer: skip_tokenizer_init=True")
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the checkpoint's generation_config recommends."""
        found = self._generation_config
        names = {name: name for name in ("temperature", "top_p", "top_k", "min_p")}
        names["max_new_tokens"] = "max_tokens"
        penalty = found.get("repetition_penalty")
        if penalty not in (None, 1, 1.0):
            logger.warning("generation_config's repetition_penalty=%s is not applied", penalty)
        return SamplingParams(
            **{
                ours: found[theirs]
                for theirs, ours in names.items()
                if found.get(theirs) is not None
            }
        )

    # The end

    def close(self) -> None:
        """Free the model's and the cache's memory; unfinished requests are gone. Later calls raise
        RuntimeError."""
        self._engine = None

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("this LLM is closed")
        return self._engine

    def _find_eos_token_ids(self) -> tuple[int, ...]:
        """generation_config's (or, without one, config.json's) and the tokenizer's own."""
        eos = token_id_tuple(self._generation_config.get("eos_token_id"))
        eos = eos or self.model_config.eos_token_ids
        own = getattr(self._tokenizer, "eos_token_id", None)
        return tuple(dict.fromkeys(eos if own is None else (*eos, own)))

    def _make_sequences(
        self,
        prompt_list: Any,
        sampling_params: SamplingParams | SequenceOf[SamplingParams] | None,
        request_id: str | None = None,
    ) -> list[Sequence]:
        """Checked sequences for all prompts, or an error before any is made."""
        tokenized = prompts.normalize(prompt_list, self._tokenizer)
        default = (
            self.get_default_sampling_params() if sampling_params is None else SamplingParams()
        )
        params = prompts.match_params(sampling_params, default, len(tokenized))
        for i, (prompt, p) in enumerate(zip(tokenized, params, strict=True)):
            name = f"prompt {i}" if request_id is None else f"request {request_id!r}"
            prompts.check(prompt, name, self.model_config.vocab_size, self.max_model_len)
            self._check_stop_token_ids(p)
        now = time.monotonic()
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
                    eos_token_ids=self._eos_token_ids,
                    prompt=prompt.text,
                    arrival_time=now,
                )
            )
        return seqs

    def _check_stop_token_ids(self, params: SamplingParams) -> None:
        for token in params.stop_token_ids or ():
            if not 0 <= token < self.model_config.vocab_size:
                raise ValueError(
                    f"stop_token_ids has the token id {token}, outside "
                    f"[0, {self.model_config.vocab_size})"
                )

    def _free_id(self, number: int) -> str:
        request_id = str(number)
        while request_id in self._open_engine().unfinished:  # somebody chose a number of ours
            request_id += "'"
        return request_id

    def _output(self, seq: Sequence) -> RequestOutput:
        completion = CompletionOutput(
            index=0,
            text=self._detokenizer.text(seq) if self._detokenizer else "",
            token_ids=seq.output_token_ids,
            finish_reason=seq.finish_reason,
            stop_reason=seq.stop_reason,
        )
        return RequestOutput(
            request_id=seq.request_id,
            prompt=seq.prompt,
            prompt_token_ids=seq.token_ids[: seq.num_prompt_tokens],
            prompt_logprobs=None,
            outputs=[completion],
            finished=seq.finished,
            metrics=seq.metrics,
            num_cached_tokens=seq.num_cached_tokens or 0,
        )


class _Progress:
    """A bar of requests done, with the tokens per second of prefill and decode."""

    def __init__(self, num_requests: int, engine: Engine, disable: bool):
        self.metrics = engine.metrics
        self.start = time.monotonic()
        self.prefill, self.decode = self.metrics.prefill_tokens, self.metrics.decode_tokens
        self.bar = tqdm(
            total=num_requests, desc="Processed prompts", disable=disable, dynamic_ncols=True
        )

    def show(self, num_finished: int) -> None:
        if not self.bar.disable:
            seconds = max(time.monotonic() - self.start, 1e-9)
            prefill = (self.metrics.prefill_tokens - self.prefill) / seconds
            decode = (self.metrics.decode_tokens - self.decode) / seconds
            self.bar.set_postfix_str(
                f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s", refresh=False
            )
            self.bar.update(num_finished)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _limits(config: EngineConfig) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens. Where only one is given, the other's default gives
    way to it."""
    seqs, tokens = config.max_num_seqs, config.max_num_batched_tokens
    if seqs is None:
        seqs = min(platform.CPU_MAX_NUM_SEQS, tokens or platform.CPU_MAX_NUM_SEQS)
    if tokens is None:
        tokens = max(platform.CPU_MAX_NUM_BATCHED_TOKENS, seqs)
    return seqs, tokens


def _sequence_seed(seed: int | None, engine_seed: int, request_number: int) -> int:
    """64 bits: the request's seed, or one drawn from the engine's for the request's number. The
    second entry keeps the two kinds apart; the last is the index of the sample in its request."""
    entropy = [engine_seed % 2**64, 1, request_number, 0] if seed is None else [seed % 2**64, 0, 0]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
