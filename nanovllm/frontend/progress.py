"""The progress bar of LLM.generate."""

import time
from collections.abc import Callable

from tqdm.auto import tqdm

from nanovllm.core.metrics import EngineMetrics


class Progress:
    """A bar of requests done, with the tokens per second of prefill and decode."""

    def __init__(
        self, num_requests: int, metrics: EngineMetrics, use_tqdm: bool | Callable[..., tqdm]
    ):
        self.metrics = metrics
        self.start = time.monotonic()
        self.prefill, self.decode = metrics.prefill_tokens, metrics.decode_tokens
        make = use_tqdm if callable(use_tqdm) else tqdm
        self.bar = make(
            total=num_requests, desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True
        )

    def show(self, num_finished: int) -> None:
        if self.bar.disable:
            return
        seconds = max(time.monotonic() - self.start, 1e-9)  # a coarse clock may stand still
        prefill = (self.metrics.prefill_tokens - self.prefill) / seconds
        decode = (self.metrics.decode_tokens - self.decode) / seconds
        self.bar.n = num_finished
        self.bar.set_postfix_str(f"prefill {prefill:.0f} tok/s, decode {decode:.0f} tok/s")

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
