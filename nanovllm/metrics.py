"""What the engine counts as it goes. The scheduler and the engine add; progress bars, benchmarks
and tests read."""

from dataclasses import dataclass


@dataclass
class EngineMetrics:
    """Totals since the engine was made.

    Attributes:
        steps: steps submitted.
        prefill_tokens: prompt tokens computed (and tokens computed again after a preemption).
        decode_tokens: tokens computed one at a time for running sequences.
        cached_tokens: tokens that were not computed because the prefix cache had them.
        preemptions: sequences put back to make room for older ones.
    """

    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
