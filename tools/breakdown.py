"""Where a run's time goes: operations by kind, idle time, padding, tail, and a timeline.

bench.py's --breakdown and --trace call it. The engine has no code for it: during one run the
executor's submit is replaced by a function that notes the step. torch's profiler sees the
operations: kernels and copies on a GPU, torch's operators on a CPU.
"""

import functools
import gzip
import json
import re
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # bench.py must start fast, and under interpreters that have only a peer
    from torch.profiler import profile

    from nanovllm.core.step import PendingStep, StepInput
    from nanovllm.engine.engine import Engine
    from nanovllm.llm import LLM

# The first pattern found in a kernel's name decides its kind. A fused kernel counts as its most
# expensive part: "linear" in the name makes it a product, whatever else it computes; FlashAttention
# is built on cutlass, so attention comes first.
GPU_KINDS = {
    "attention": r"paged_attention|merge_prefixes|flash|fmha",
    "products": r"matmul|linear|gemm|gemv|nvjet|cutlass|splitk|cublas|xmma",
    "norms, RoPE, activation": r"norm|rope|silu",
    "sampling": r"sample|argmax|softmax|sort|topk|scan",
    "copies and indexing": r"memcpy|memset|copy|fill|cat|index|gather|scatter",
}
OTHER_KERNELS = "other kernels"
IDLE_WITHIN, IDLE_BETWEEN = "GPU idle within steps", "GPU idle between steps"
CPU_KINDS = {
    "attention": r"^attention$|scaled_dot_product",  # the first is `_watched`'s
    "products": r"linear|addmm|bmm|::mm$|matmul",
}
OTHER_OPERATORS, PYTHON = "other operators", "between operators (Python)"


class Work(NamedTuple):
    """What a step must compute: the numbers that its ideal time depends on.

    Attributes:
        new_tokens: query tokens.
        pairs: pairs of a query token and a key that it sees.
        keys_read: keys of earlier steps; for decodes the new key too. A shared prefix counts once.
        sampled: tokens sampled.
    """

    new_tokens: int
    pairs: float
    keys_read: int
    sampled: int


@dataclass(frozen=True, slots=True)
class Step:
    """A submitted step.

    Attributes:
        start, end: begin and end of the submitting call, nanoseconds since 1970. On a CPU the call
            runs the step.
        sequences, decodes: sequences in the step, and decodes among them.
        graph_size: tokens of the CUDA graph; None: the step ran eagerly.
        running, waiting: sequences with and without blocks.
    """

    start: int
    end: int
    sequences: int
    decodes: int
    prefill_tokens: int
    graph_size: int | None
    running: int
    waiting: int
    work: Work


class Event(NamedTuple):
    """An operation, in nanoseconds since 1970, and the index of its step; -1: outside of steps."""

    name: str
    start: int
    end: int
    step: int = -1


def measure(
    llm: "LLM", run: Callable[[], object], shared_len: int = 0, trace: Path | None = None
) -> dict[str, Any]:
    """Profile a run.

    Args:
        llm: idle; on a GPU its graphs are captured.
        run: generates until the engine is idle again.
        shared_len: length in tokens of the prefix that all prompts share.
        trace: file for the timeline; gzipped if its name ends in .gz.

    Returns: a JSON object, see `summarize`.
    """
    from torch.profiler import ProfilerActivity, profile

    engine = llm.llm_engine
    on_gpu = engine.executor.device.type == "cuda"  # type: ignore[attr-defined]
    # On a GPU the host's operators are not profiled: that would slow the host down, and the GPU
    # would wait for it.
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    steps: list[Step] = []
    profiler = profile(activities=[activity])
    llm.apply_model(lambda _: profiler.start())  # it sees the thread that starts it, the engine's
    with _watched(engine, steps, shared_len, on_gpu):
        start = time.time_ns()
        run()
        end = time.time_ns()
    llm.apply_model(lambda _: profiler.stop())
    if on_gpu:
        kernels = _kernels(profiler, [step.start for step in steps])
        parts, spans = gpu_parts(kernels, start, end), step_spans(kernels, len(steps))
    else:
        parts, spans = cpu_parts(_operators(profiler), start, end), [None] * len(steps)
    if trace:
        write_trace(profiler, trace_events(steps, spans), trace)
    ends = [
        min(span[1], end) if span else step.end for step, span in zip(steps, spans, strict=True)
    ]
    return summarize(steps, ends, parts, start, end) | {
        "lost_steps": sum(span is None for span in spans) if on_gpu else 0
    }


# Watching


@contextmanager
def _watched(engine: "Engine", steps: list[Step], shared_len: int, on_gpu: bool) -> Iterator[None]:
    """Note each step that the engine submits. On a CPU, attention is marked by a span of its own:
    it consists of operators that other parts use too. On a GPU it has kernels of its own."""
    from torch.profiler import record_function

    executor: Any = engine.executor
    scheduler, [attention] = engine.scheduler, executor.attentions
    submit, attend = executor.submit, attention.attend

    def noted_submit(step: "StepInput") -> "PendingStep":
        start = time.time_ns()
        with nullcontext() if on_gpu else record_function(f"step {len(steps)}"):
            pending = submit(step)
        steps.append(
            Step(
                start,
                time.time_ns(),
                sequences=len(step.rows),
                decodes=step.num_decodes,
                prefill_tokens=sum(len(chunk.token_ids) for chunk in step.chunks),
                graph_size=pending.graph_size,
                running=len(scheduler.running),
                waiting=len(scheduler.waiting),
                work=work_of(step, shared_len),
            )
        )
        return pending

    def named_attend(*args: Any) -> Any:
        with record_function("attention"):
            return attend(*args)

    executor.submit = noted_submit
    if not on_gpu:
        attention.attend = named_attend
    try:
        yield
    finally:  # uncovers the classes' own methods
        del executor.submit
        if not on_gpu:
            del attention.attend


def work_of(step: "StepInput", shared_len: int) -> Work:
    """What the step computes; the first `shared_len` keys are shared by all sequences."""
    contexts = (step.decode_positions + 1).tolist()
    chunks = [(chunk.position, chunk.position + len(chunk.token_ids)) for chunk in step.chunks]
    keys_read = [*contexts, *(start for start, _ in chunks)]
    sharing = sum(n >= shared_len for n in keys_read)
    return Work(
        new_tokens=len(contexts) + sum(end - start for start, end in chunks),
        pairs=sum(contexts) + sum((end**2 - start**2) / 2 for start, end in chunks),
        keys_read=sum(keys_read) - shared_len * max(0, sharing - 1),
        sampled=len(contexts) + sum(chunk.samples for chunk in step.chunks),
    )


def _kernels(profiler: "profile", step_starts: list[int]) -> list[Event]:
    """The GPU's operations, in order, from kineto's own list of events: making torch's list of them
    takes a minute for the 300,000 events of a long run."""
    from torch.autograd import DeviceType

    launches: dict[int, int] = {}
    seen: list[tuple[int, int, str, int]] = []
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.is_user_annotation():
            continue
        if event.device_type() == DeviceType.CUDA:
            start = event.start_ns()
            seen.append((start, start + event.duration_ns(), event.name(), event.correlation_id()))
        else:
            launches[event.correlation_id()] = event.start_ns()
    return assign_steps(seen, launches, step_starts)


def assign_steps(
    seen: Iterable[tuple[int, int, str, int]], launches: dict[int, int], step_starts: list[int]
) -> list[Event]:
    """Kernels in order, each with the step that launched it. A kernel without a launch in the
    profile belongs to the step of the kernel before it: all run on one stream.

    Args:
        seen: (start, end, name, correlation id) of each kernel.
        launches: correlation id -> time of the launch on the host.
        step_starts: time at which the host began to submit each step.
    """
    kernels, step = [], -1
    for start, end, name, correlation in sorted(seen):
        if correlation in launches:
            step = bisect_right(step_starts, launches[correlation]) - 1
        kernels.append(Event(name, start, end, step))
    return kernels


def _operators(profiler: "profile") -> list[Event]:
    """torch's operators on the engine's thread, in order, outer ones first."""
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    thread = next((e.start_thread_id() for e in events if e.name() == "step 0"), None)
    operators = [
        Event(event.name(), event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.start_thread_id() == thread and not event.name().startswith("step ")
    ]
    return sorted(operators, key=lambda event: (event.start, -event.end))


# Where the time went


def gpu_parts(kernels: Iterable[Event], start: int, end: int) -> dict[str, int]:
    """Nanoseconds of a run by kind of kernel, and idle time within and between steps. They add up
    to the run: the time in which kernels overlap counts for the kernel that started first.

    Args:
        kernels: in order.
        start, end: the run.
    """
    parts = dict.fromkeys([*GPU_KINDS, OTHER_KERNELS, IDLE_WITHIN, IDLE_BETWEEN], 0)
    reached, step = start, -1
    for kernel in kernels:
        begun, ended = min(kernel.start, end), min(kernel.end, end)  # two clocks
        if begun > reached:
            parts[IDLE_WITHIN if kernel.step == step else IDLE_BETWEEN] += begun - reached
            reached = begun
        if ended > reached:
            parts[gpu_kind(kernel.name)] += ended - reached
            reached = ended
        step = kernel.step
    parts[IDLE_BETWEEN] += end - reached
    return parts


def cpu_parts(operators: Iterable[Event], start: int, end: int) -> dict[str, int]:
    """As gpu_parts, for operators that call other operators: an outer operator with a kind counts
    with all of its time.

    Args:
        operators: in order, outer operators first.
        start, end: the run.
    """
    parts = dict.fromkeys([*CPU_KINDS, OTHER_OPERATORS, PYTHON], 0)
    reached = kind_reached = start
    busy = 0
    for operator in operators:
        busy += max(0, operator.end - max(operator.start, reached))
        reached = max(reached, operator.end)
        kind = cpu_kind(operator.name)
        if kind != OTHER_OPERATORS:
            parts[kind] += max(0, operator.end - max(operator.start, kind_reached))
            kind_reached = max(kind_reached, operator.end)
    parts[OTHER_OPERATORS] = busy - sum(parts.values())
    parts[PYTHON] = end - start - busy
    return parts


@functools.cache
def gpu_kind(name: str) -> str:
    return _kind(name, GPU_KINDS, OTHER_KERNELS)


@functools.cache
def cpu_kind(name: str) -> str:
    return _kind(name, CPU_KINDS, OTHER_OPERATORS)


def _kind(name: str, kinds: dict[str, str], other: str) -> str:
    matches = (kind for kind, pattern in kinds.items() if re.search(pattern, name, re.IGNORECASE))
    return next(matches, other)


def step_spans(kernels: Iterable[Event], num_steps: int) -> list[tuple[int, int] | None]:
    """The first start and the last end of each step's kernels; None for a step without kernels."""
    spans: list[tuple[int, int] | None] = [None] * num_steps
    for kernel in kernels:
        if kernel.step >= 0:
            span = spans[kernel.step] or (kernel.start, kernel.end)
            spans[kernel.step] = span[0], max(span[1], kernel.end)
    return spans


def summarize(
    steps: list[Step], ends: list[int], parts: dict[str, int], start: int, end: int
) -> dict[str, Any]:
    """The run in numbers.

    Args:
        ends: time at which each step ended on its device.
        parts: name -> nanoseconds.

    Returns:
        seconds: length of the run.
        steps, graph_steps: number of steps, and of steps that replayed a CUDA graph.
        parts: name -> seconds; they add up to the run.
        padding: the share of the graphs' tokens that were padding; None without graphs.
        tail: the time after the last step with at least half of the largest number of sequences:
            its `seconds`, its `steps`, its share of the sampled tokens, and `largest_batch`. In a
            tail the GPU computes few sequences, so more sequences would cost little.
        work: the Work of each step.
    """
    graph_steps = [
        (step.graph_size, step.decodes + step.prefill_tokens) for step in steps if step.graph_size
    ]
    graph_rows = sum(size for size, _ in graph_steps)
    largest = max(step.sequences for step in steps)
    last = max(i for i, step in enumerate(steps) if 2 * step.sequences >= largest)
    sampled = [step.work.sampled for step in steps]
    return {
        "seconds": (end - start) / 1e9,
        "steps": len(steps),
        "graph_steps": len(graph_steps),
        "parts": {part: nanoseconds / 1e9 for part, nanoseconds in parts.items()},
        "padding": 1 - sum(n for _, n in graph_steps) / graph_rows if graph_steps else None,
        "tail": {
            "seconds": (end - ends[last]) / 1e9 if last < len(steps) - 1 else 0.0,
            "steps": len(steps) - 1 - last,
            "token_share": sum(sampled[last + 1 :]) / sum(sampled),
            "largest_batch": largest,
        },
        "work": [step.work for step in steps],
    }


def print_breakdown(breakdown: dict[str, Any], timed_seconds: float) -> None:
    """A line for each part, beside its ideal if it has one.

    Args:
        breakdown: result of `measure`, with `ideals`: part (or "all") -> seconds.
        timed_seconds: length of the same run without the profiler.
    """
    seconds, ideals, tail = breakdown["seconds"], breakdown["ideals"], breakdown["tail"]
    graphs = f", {breakdown['graph_steps']:,} of them CUDA graphs" * bool(breakdown["graph_steps"])
    print(
        f"\nnanovllm's third run, under the profiler: {seconds:.2f} s ({timed_seconds:.2f} s "
        f"without), {breakdown['steps']:,} steps{graphs}; ideals are of these steps"
    )
    print(("{:<28}" + "{:>10}" * 4).format("", "s", "share", "ideal s", "of ideal"))
    for part, spent in (breakdown["parts"] | {"all": seconds}).items():
        line = f"{part:<28}{spent:>10.3f}{spent / seconds:>10.1%}"
        if part in ideals and spent:
            line += f"{ideals[part]:>10.3f}{ideals[part] / spent:>10.0%}"
        print(line)
    if breakdown["padding"] is not None:
        print(f"padding: {breakdown['padding']:.1%} of the rows of CUDA graphs")
    print(
        f"tail: {tail['seconds'] / seconds:.1%} of the time for {tail['token_share']:.1%} of the "
        f"tokens, {tail['steps']} steps after the last with at least half of the largest batch, "
        f"{tail['largest_batch']}"
    )
    if breakdown["lost_steps"]:
        print(
            f"the profiler saw no kernel of {breakdown['lost_steps']} steps, which count as idle: "
            f"the run was too long for its buffers"
        )


# The timeline: torch's trace with the steps above it, in Chrome's trace format (Perfetto reads it).

TRACK = 10**7  # a process id beyond Linux's


def trace_events(
    steps: list[Step], spans: list[tuple[int, int] | None]
) -> Iterator[dict[str, Any]]:
    """The steps as events, `ts` in nanoseconds since 1970: a track for their submission, a track
    for their time on the GPU, and counters of sequences."""
    yield {"ph": "M", "name": "process_name", "pid": TRACK, "args": {"name": "nanovllm"}}
    yield {"ph": "M", "name": "process_sort_index", "pid": TRACK, "args": {"sort_index": -1}}
    for tid, track in enumerate(["steps submitted", "steps on the GPU"][: 1 + any(spans)]):
        yield {"ph": "M", "name": "thread_name", "pid": TRACK, "tid": tid, "args": {"name": track}}
    ran_until = 0
    for number, (step, span) in enumerate(zip(steps, spans, strict=True)):
        graph = "eager" if step.graph_size is None else step.graph_size
        event = {
            "ph": "X",
            "name": f"step {number}: {step.decodes} decodes, {step.prefill_tokens} prefill tokens",
            "pid": TRACK,
            "args": {
                "step": number,
                "decodes": step.decodes,
                "prefill tokens": step.prefill_tokens,
                "CUDA graph": graph,
                "running": step.running,
                "waiting": step.waiting,
            },
        }
        yield event | {"tid": 0, "ts": step.start, "dur": step.end - step.start}
        if span:  # a step's first kernel may start before the last kernel of the step before ends
            start, ran_until = max(span[0], ran_until), max(span[1], ran_until)
            yield event | {"tid": 1, "ts": start, "dur": ran_until - start}
        counts = {"running": step.running, "waiting": step.waiting}
        yield {"ph": "C", "name": "sequences", "pid": TRACK, "ts": step.start, "args": counts}


def write_trace(profiler: "profile", events: Iterable[dict[str, Any]], path: Path) -> None:
    """Write torch's trace with more events at its beginning. It is copied line by line, as a long
    trace has hundreds of megabytes."""
    with tempfile.TemporaryDirectory() as folder:
        torchs = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(torchs))
        with torchs.open() as source, _create(path) as out:
            base = 0  # the zero of torch's times
            for line in source:
                out.write(line)
                if found := re.search(r'"baseTimeNanoseconds": *(\d+)', line):
                    base = int(found[1])
                if '"traceEvents": [' in line:
                    break
            for event in events:
                in_microseconds = {
                    key: (event[key] - zero) / 1000
                    for key, zero in (("ts", base), ("dur", 0))
                    if key in event
                }
                out.write(json.dumps(event | in_microseconds) + ",\n")
            shutil.copyfileobj(source, out)


def _create(path: Path) -> Any:
    return gzip.open(path, "wt", compresslevel=4) if path.suffix == ".gz" else path.open("w")
