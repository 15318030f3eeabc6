"""What the engine has counted, as the objects that LLM.get_metrics gives. Names are vLLM's where it
counts the same."""

from nanovllm.core.metrics import Counter, Gauge, Histogram, Metric
from nanovllm.engine.engine import Engine

FINISH_REASONS = ("stop", "length", "abort", "error")


def read_metrics(engine: Engine, labels: dict[str, str]) -> list[Metric]:
    """A snapshot. Running requests are counted here, not in every step."""
    metrics, scheduler = engine.metrics, engine.scheduler
    blocks = scheduler.block_manager
    num_generated = [
        (seq.num_prompt_tokens, len(seq.token_ids) - seq.num_prompt_tokens)
        for samples in engine.unfinished.values()
        for seq in samples
    ]
    counters = {
        "vllm:prefix_cache_queries": metrics.prefill_tokens + metrics.cached_tokens,
        "vllm:prefix_cache_hits": metrics.cached_tokens,
        "vllm:num_preemptions": metrics.preemptions,
        "vllm:prompt_tokens": metrics.prompt_tokens + sum(n for n, out in num_generated if out),
        "vllm:generation_tokens": metrics.generation_tokens + sum(out for _, out in num_generated),
        "nanovllm:steps": metrics.steps,
    }
    gauges = {
        "vllm:num_requests_running": len(scheduler.running),
        "vllm:num_requests_waiting": len(scheduler.waiting),
        "vllm:kv_cache_usage_perc": 1 - blocks.num_free / blocks.num_blocks,
        "nanovllm:kv_cache_waste_perc": metrics.kv_cache_waste,
    }
    histograms = {
        **metrics.intervals,
        "vllm:inter_token_latency_seconds": metrics.between_tokens,
        "vllm:request_generation_tokens": metrics.num_generated,
    }
    return [
        *(Gauge(name, {**labels}, float(value)) for name, value in gauges.items()),
        *(Counter(name, {**labels}, value) for name, value in counters.items()),
        *(
            Counter("vllm:request_success", {**labels, "finished_reason": reason}, num)
            for reason in FINISH_REASONS
            for num in [metrics.finish_reasons[reason]]
        ),
        *(
            Histogram(name, {**labels}, sum(seen.counts), seen.sum, seen.buckets)
            for name, seen in histograms.items()
        ),
    ]
