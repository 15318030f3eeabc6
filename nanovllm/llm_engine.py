"""LLMEngine, an LLM that is stepped by hand, by vLLM's names; and what vLLM's scripts import beside
it."""

import gc
import logging
from collections.abc import Mapping
from typing import Any

import torch

from nanovllm.config import options_of
from nanovllm.llm import LLM, Prompt
from nanovllm.ops import platform
from nanovllm.sampling_params import SamplingParams


class LLMEngine(LLM):
    """An LLM whose requests run when step() is called. Arguments and errors are LLM's.

    Example:
        >>> engine = LLMEngine.from_engine_args(EngineArgs("assets/tiny-qwen3"))
        >>> engine.add_request("0", "In the beginning", SamplingParams(temperature=0))
        >>> while engine.has_unfinished_requests():
        ...     outputs = engine.step()
    """

    @classmethod
    def from_engine_args(
        cls,
        engine_args: Any,
        usage_context: Any = None,
        stat_loggers: list[Any] | None = None,
        enable_multiprocessing: bool = False,
    ) -> "LLMEngine":
        """From an EngineArgs. The other arguments are vLLM's and have no effect; but for
        stat_loggers, which is a ValueError."""
        return cls(**options_of(engine_args, stat_loggers))

    def add_request(  # type: ignore[override]
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
    ) -> str:
        """Queue one request; step() runs it.

        Args:
            request_id: not one that is unfinished.
            prompt, params, lora_request, tokenization_kwargs, priority: as for LLM.generate.
            arrival_time, trace_headers: vLLM's, no effect.
            prompt_text: the output's `prompt`, where `prompt` is token ids.

        Returns: the request's id.
        """
        if not isinstance(request_id, str):
            raise TypeError(f"request_id must be a string, got {request_id!r:.80}")
        if prompt_text is not None and isinstance(prompt, list):
            prompt = {"prompt_token_ids": prompt, "prompt": prompt_text}
        return super().add_request(
            prompt,
            params,
            request_id,
            priority,
            lora_request=lora_request,
            tokenization_kwargs=tokenization_kwargs,
        )

    def has_unfinished_requests(self) -> bool:
        """Whether a request is unfinished or step() has more to give."""
        return not self.is_finished()

    def get_num_unfinished_requests(self) -> int:
        """How many requests have not ended, or have an output that step() is still to give."""
        by_hand = self._by_hand
        return self._thread.call(
            lambda _: len({seq.request_id for seq in (*by_hand.seqs, *by_hand.news)})
        )

    def abort_request(self, request_ids: str | list[str]) -> None:
        """End one request, or some, without an output; a request that has ended or is unknown is
        left alone."""
        for request_id in [request_ids] if isinstance(request_ids, str) else request_ids:
            self.abort(request_id)

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, or None."""
        return self._checkpoint.tokenizer


def init_logger(name: str) -> logging.Logger:
    """Python's own logger of that name."""
    return logging.getLogger(name)


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Free what an LLM that was deleted has left. There are no process groups to end, so an LLM
    that is in use goes on."""
    gc.collect()
    if torch.cuda.is_available():
        platform.release_memory(torch.device("cuda"))
