"""bench.py --breakdown and --trace: made-up events of a GPU, a real run on the CPU."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from patience import PATIENCE

from nanovllm import SamplingParams
from nanovllm.core.step import Chunk, StepInput
from tools import breakdown
from tools.breakdown import Event, Step, Work

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("kind", "names"),
    {
        "attention": (
            "paged_attention_kernel",
            "merge_prefixes_kernel",
            "void cutlass::device_kernel<flash::FlashAttnFwdSm90<cutlass::bfloat16_t>>(Params)",
            "void flash_fwd_splitkv_kernel<...>",
        ),
        "products": (
            "nvjet_tst_128x64_64x6_2x1_v_bz_TNT",
            "void cublasLt::splitKreduce_kernel<32, 16, int, float>",
            "sm80_xmma_gemm_bf16bf16_bf16f32",
            "gemv_kernel",
            "rms_norm_linear_kernel",
            "matmul_silu_kernel",
        ),
        "norms, RoPE, activation": (
            "rms_norm_kernel",
            "qk_norm_rope_store_kernel",
            "silu_and_mul_kernel",
        ),
        "sampling": (
            "sample_blocks_kernel",
            "sample_kernel",
            "void at::native::reduce_kernel<512, 1, ReduceOp<float, ArgMaxOps<float>>>",
        ),
        "copies and indexing": (
            "Memcpy HtoD (Pinned -> Device)",
            "Memset (Device)",
            "void at::native::index_elementwise_kernel<128, 4>",
        ),
        "other kernels": ("void at::native::unrolled_elementwise_kernel<CUDAFunctorOnSelf_add>",),
    }.items(),
)
def test_kernels_are_known_by_name(kind, names):
    assert {breakdown.gpu_kind(name) for name in names} == {kind}


def test_a_gpus_time_is_parted_once():
    kernels = [
        Event("Memcpy HtoD", 110, 120, step=0),
        Event("nvjet_tst", 125, 160, step=0),
        Event("paged_attention_kernel", 150, 190, step=0),  # launched before the product's end
        Event("rms_norm_kernel", 170, 180, step=0),  # beside the attention
        Event("nvjet_tst", 220, 290, step=1),
        Event("sample_kernel", 290, 305, step=1),  # by its clock after the run
    ]
    parts = breakdown.gpu_parts(kernels, start=100, end=300)
    assert sum(parts.values()) == 200
    assert {part: time for part, time in parts.items() if time} == {
        "GPU idle between steps": 10 + 30,
        "GPU idle within steps": 5,
        "copies and indexing": 10,
        "products": 35 + 70,
        "attention": 30,
        "sampling": 10,
    }
    assert breakdown.step_spans(kernels, 3) == [(110, 190), (220, 305), None]


def test_kernels_belong_to_the_step_that_launched_them():
    # The second step's kernels are launched while the first's run; a graph's share one launch, and
    # the launch of the last was not seen.
    seen = [(50, 60, "a", 1), (70, 80, "c", 3), (60, 70, "b", 3), (80, 90, "d", 4)]
    kernels = breakdown.assign_steps(seen, launches={1: 12, 3: 25}, step_starts=[10, 20])
    assert [(kernel.name, kernel.step) for kernel in kernels] == [
        *(("a", 0), ("b", 1), ("c", 1), ("d", 1))
    ]


def test_a_cpus_operators_have_the_time_of_those_they_call():
    operators = [
        Event("aten::embedding", 110, 120),
        Event("aten::index_select", 112, 118),
        Event("mkldnn::_linear_pointwise", 120, 150),
        Event("attention", 160, 200),
        Event("aten::index_select", 162, 170),
        Event("aten::matmul", 170, 190),
        Event("aten::bmm", 172, 188),
        Event("aten::outer", 200, 220),
        Event("aten::mm", 205, 210),
    ]
    assert breakdown.cpu_parts(operators, start=100, end=250) == {
        "attention": 40,
        "products": 30 + 5,
        "other operators": 10 + 15,
        "between operators (Python)": 10 + 10 + 30,
    }


def test_the_work_of_a_step_by_hand():
    step = StepInput(
        decode_rows=np.array([0, 1]),
        decode_positions=np.array([9, 4]),
        chunks=[Chunk(2, 6, [1, 2, 3], samples=False), Chunk(3, 0, [4], samples=True)],
    )
    # Decodes see 10 and 5 keys; the chunk's tokens 6 and half of their own; the other half a key.
    pairs = 10 + 5 + (81 - 36) / 2 + 0.5
    assert breakdown.work_of(step, 0) == Work(6, pairs, keys_read=10 + 5 + 6, sampled=3)
    # Three of them begin alike, and two need not read it again.
    assert breakdown.work_of(step, 4) == Work(6, pairs, keys_read=10 + 5 + 6 - 2 * 4, sampled=3)


def make_step(start: int, sequences: int, graph_size: int | None) -> Step:
    work = Work(sequences, 0, 0, sampled=sequences)
    return Step(start, start + 5, sequences, sequences, 0, graph_size, sequences, 1, work)


STEPS = [make_step(10, 7, 8), make_step(20, 2, 2), make_step(30, 4, 4), make_step(40, 3, 4)]


def test_padding_and_tail_by_hand():
    # A batch of 4 is half of 7, so the tail is the last step; the small batch before is none.
    summary = breakdown.summarize(STEPS, [29, 39, 49, 59], {"products": 40}, start=0, end=60)
    assert summary["padding"] == pytest.approx(1 - 16 / 18)
    assert summary["tail"] == pytest.approx(
        {"seconds": 11e-9, "steps": 1, "token_share": 3 / 16, "largest_batch": 7}
    )
    alone = breakdown.summarize(STEPS[:1], [29], {}, start=0, end=60)
    assert alone["tail"]["seconds"] == 0


class FakeProfiler:
    """What torch's trace looks like around its events."""

    def export_chrome_trace(self, path: str) -> None:
        head = '{\n  "schemaVersion": 1,\n    "baseTimeNanoseconds": 10,\n    "traceEvents": [\n  '
        event = {"ph": "X", "name": "nvjet_tst", "pid": 0, "tid": 7, "ts": 0.02, "dur": 0.01}
        Path(path).write_text(head + json.dumps(event) + '\n  ],"traceName": "/tmp/x.json" }')


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_steps_join_torchs_timeline(tmp_path, name):
    spans = [(22, 29), (27, 39), (39, 49), None]
    events = breakdown.trace_events(STEPS, spans)
    breakdown.write_trace(FakeProfiler(), events, tmp_path / name)
    data = (tmp_path / name).read_bytes()
    text = gzip.decompress(data) if name.endswith(".gz") else data
    events = json.loads(text)["traceEvents"]
    assert events.pop()["name"] == "nvjet_tst"
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tracks == {"steps submitted", "steps on the GPU"}
    on_gpu = [event for event in events if event["ph"] == "X" and event["tid"] == 1]
    # In microseconds since the base, and one after another.
    assert [(event["ts"], event["dur"]) for event in on_gpu] == [
        *((0.012, 0.007), (0.019, 0.010), (0.029, 0.010))
    ]
    assert on_gpu[0]["name"] == "step 0: 7 decodes, 0 prefill tokens"
    assert on_gpu[0]["args"]["CUDA graph"] == 8


def test_the_profiled_engine_is_left_as_it_was(llm):
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)

    def run():
        run.outputs = llm.generate(["In the beginning"], params, use_tqdm=False)

    run()
    expected, run.outputs = run.outputs[0]["token_ids"], None
    result = breakdown.measure(llm, run)
    assert run.outputs[0]["token_ids"] == expected
    assert sum(work.sampled for work in result["work"]) == 4
    assert "submit" not in vars(engine.executor)
    assert "attend" not in vars(engine.executor.attentions[0])


def run_bench(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_run_is_broken_down_and_traced(tiny, tmp_path):
    trace = tmp_path / "run.json.gz"
    run = run_bench(
        *("--model", str(tiny), "--input-len", "20", "--output-len", "6", "--num-prompts", "3"),
        *("--json", "--trace", str(trace)),
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)["engines"]["nanovllm"]
    assert len(result["run_seconds"]) == 2
    broken_down = result["breakdown"]
    parts, ideals = broken_down["parts"], broken_down["ideals"]
    assert list(parts) == [*breakdown.CPU_KINDS, breakdown.OTHER_OPERATORS, breakdown.PYTHON]
    assert sum(parts.values()) == pytest.approx(broken_down["seconds"])
    assert min(parts.values()) > 0
    assert 0 < ideals["attention"] < parts["attention"]
    assert 0 < ideals["products"] < parts["products"]
    assert max(ideals["attention"], ideals["products"]) < ideals["all"]
    assert broken_down["padding"] is None and broken_down["lost_steps"] == 0

    with gzip.open(trace, "rt") as file:
        events = json.load(file)["traceEvents"]
    steps = [event for event in events if "prefill tokens" in event.get("args", {})]
    assert len(steps) == broken_down["steps"] == 6
    assert steps[0]["args"] == {
        "step": 0,
        "decodes": 0,
        "prefill tokens": 60,
        "CUDA graph": "eager",
        "running": 3,
        "waiting": 0,
    }
    assert steps[5]["name"] == "step 5: 3 decodes, 0 prefill tokens"
    # The steps' track fits what torch saw: products within the first step.
    start, end = steps[0]["ts"], steps[0]["ts"] + steps[0]["dur"]
    products = [event["ts"] for event in events if "linear" in event["name"]]
    assert products and start < min(products) < end


def test_the_breakdown_is_printed_below_the_table(tiny):
    run = run_bench("--model", str(tiny), "--input-len", "9", "--output-len", "2", "--breakdown")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    [header] = [i for i, line in enumerate(lines) if line.startswith("nanovllm's third run")]
    assert " 2 steps; " in lines[header]
    parts = {line[:28].strip(): line[28:].split() for line in lines[header + 2 : header + 7]}
    assert len(parts["attention"]) == len(parts["products"]) == len(parts["all"]) == 4
    assert len(parts["other operators"]) == 2
    assert lines[-1].startswith("tail: 0.0% of the time for 0.0% of the tokens")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--breakdown", "--engine", "vllm"],
            "see only into nanovllm, which --engine doesn't name",
        ),
        (["--trace", "t.json", "--engine", "transformers"], "see only into nanovllm"),
        (["--trace", "/nowhere/t.json"], "'/nowhere/t.json' is no file that can be written"),
        (["--trace", "/"], "'/' is no file that can be written"),
    ],
)
def test_what_cannot_be_broken_down_is_named(args, message):
    run = run_bench(*args)
    assert run.returncode == 2 and message in run.stderr
