"""bench.py: the workloads, the ideal, and its command line on the model in the box."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from random import randint, seed

import pytest
from patience import PATIENCE

import bench
from nanovllm import LLM, SamplingParams
from nanovllm.core.model_config import ModelConfig

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "workloads.py"


@pytest.mark.skipif(not SHARED.exists(), reason="the agreed workloads are not beside the project")
@pytest.mark.parametrize("name", ["readme", "short", "prefix", "bs1", "cpu"])
def test_workloads_are_the_agreed_ones(name):
    spec = importlib.util.spec_from_file_location("workloads", SHARED)
    shared = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shared)
    ours = bench.make_workload(name)
    assert (ours.prompts, ours.output_lens) == shared.workload(name)


def test_a_queue_has_more_short_requests_than_run_at_a_time():
    queue = bench.make_workload("queue")
    assert len(queue.prompts) == len(queue.output_lens) == 4096
    lens = [*map(len, queue.prompts), *queue.output_lens]
    assert (min(lens), max(lens)) == (16, 128)


def test_the_second_run_has_other_tokens_unless_the_prefix_is_shared():
    workload = bench.Workload([[1, 2], [9, 3]], [1, 1])
    assert workload.prompts_of_run(0, 10) == [[1, 2], [9, 3]]
    assert workload.prompts_of_run(1, 10) == [[2, 3], [0, 4]]
    shared = bench.Workload([[1, 2], [1, 3]], [1, 1], shared_len=1)
    assert shared.prompts_of_run(1, 10) == shared.prompts


# Ideals of these workloads on an H200 (4.5 TB/s, 697 TFLOP/s) and an H100 (3.03, 723), which were
# computed apart from this code; in how many steps the prompts are computed is open.
@pytest.mark.parametrize(
    ("name", "shape", "warm", "h200", "h100"),
    [
        ("readme", "qwen3-0.6b", False, 37_776, 25_941),
        ("short", "qwen3-0.6b", False, 217_715, 162_200),
        ("prefix", "qwen3-0.6b", False, 205_428, 149_266),
        ("prefix", "qwen3-0.6b", True, 254_600, None),
        ("bs1", "qwen3-0.6b", False, 3_644, 2_454),
        ("readme", "qwen3-8b", False, 13_022, 9_726),
        ("bs1", "qwen3-8b", False, 296, 200),
    ],
)
def test_the_ideal_is_what_others_computed(name, shape, warm, h200, h100):
    workload = bench.make_workload(name)
    model = ModelConfig.from_hf(bench.SHAPES[shape])
    for rates, expected in ((4.5e12, 697e12), h200), ((3.03e12, 723e12), h100):
        if expected:
            seconds = bench.ideal_seconds(workload, bench.Ideal(model, 2, *rates), warm=warm)
            assert workload.output_tokens / seconds == pytest.approx(expected, rel=0.015)


def test_the_ideal_of_a_small_case_by_hand():
    model = ModelConfig.from_hf(
        dict(
            architectures=["Qwen3ForCausalLM"],
            hidden_size=4,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=2,
            vocab_size=16,
            max_position_embeddings=64,
        )
    )
    # A layer: q and o 4 x 4, k and v 4 x 2, gate, up and down 4 x 8; the head 4 x 16.
    weights = 2 * 16 + 2 * 8 + 3 * 32 + 64
    workload = bench.Workload([[1, 2], [3]], [2, 1])
    # Without limits on operations: the weights twice, and the keys and values of 3 tokens.
    bytes_read = 2 * weights + 3 * 2 * 2
    assert bench.ideal_seconds(workload, bench.Ideal(model, 1, 1.0, 1e30)) == bytes_read
    # Without limits on bytes: 4 tokens through the layer, 3 through the head, 4 x 4 operations a
    # pair: 2 x 2 / 2 and 1 / 2 of them in the prompts, 3 in the decode.
    ops = 4 * 2 * (weights - 64) + 3 * 2 * 64 + 16 * (2 + 0.5 + 3)
    assert bench.ideal_seconds(workload, bench.Ideal(model, 1, 1e30, 1.0)) == ops


def run_bench(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_run_compares_engines_and_a_missing_one_fails_alone(tiny):
    run = run_bench(
        *("--model", str(tiny), "--input-len", "20", "--output-len", "6", "--num-prompts", "3"),
        *("--engine", "nanovllm", "transformers", "vllm", "--option", "block_size=8", "--json"),
    )
    assert run.returncode == 1 and "No module named 'vllm'" in run.stderr
    report = json.loads(run.stdout)
    assert (report["requests"], report["input_tokens"], report["output_tokens"]) == (3, 60, 18)
    assert report["engines"].pop("vllm") == {"failed": True}
    for result in report["engines"].values():
        assert len(result["run_seconds"]) == 2
        assert result["tokens_per_second"] == pytest.approx(18 / min(result["run_seconds"]))
        assert 0 < result["share_of_ideal"] < 1
        assert result["start_seconds"] > 0 and result["peak_bytes"] > 50 << 20
        assert f"{result['device']} {result['dtype']}" in report["machines"]
    # Three requests of 20 to 25 tokens in three or four blocks of 8.
    assert 0.05 < report["engines"]["nanovllm"]["kv_cache_waste"] < 0.3


def test_the_table_shows_what_was_asked(tiny):
    lens = "--input-len", "9", "--output-len", "2"
    run = run_bench("--model", str(tiny), *lens, "--sampling", "logprobs=2")
    assert run.returncode == 0, run.stderr
    assert "own: 32 requests, 288 tokens in, 64 out" in run.stdout
    assert ", logprobs=2" in run.stdout
    [row] = [line for line in run.stdout.splitlines() if line.startswith("nanovllm 0.")]
    assert len(row.split()) == 11


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workload", "long"], "invalid choice: 'long'"),
        (["--workload", "cpu", "--input-len", "3"], "--workload excludes --input-len"),
        (["--input-len", "0"], "'0' is not a whole number of at least 1"),
        (["--engine", "vlm"], "'vlm' is not one of nanovllm, vllm, transformers"),
        (["--engine", "vllm=/nowhere"], "'/nowhere' is no program that can be run"),
        (["--engine", "vllm", "vllm"], "--engine names one twice"),
        (["--option", "a=1", "--option", "a=2"], "--option names one twice"),
        (["--option", "block_size"], "'block_size' is not NAME=VALUE"),
        (["--sampling", "top_k=5", "top_k=6"], "--sampling names one twice"),
        (["--sampling", "top_k=5", "--engine", "transformers"], "nanovllm and vLLM alone"),
        (["--model", "/nowhere"], "--model /nowhere"),
        (["--model", "a", "--shape", "qwen3-8b"], "not allowed with argument"),
        (["--input-len", "50000"], "a request of 50128 tokens is too long: the model takes 40960"),
    ],
)
def test_bad_arguments_are_named(args, message):
    run = run_bench(*args)
    assert run.returncode == 2 and message in run.stderr


def test_the_calls_of_nano_vllms_benchmark(copy_tiny, capsys):
    # Its options, its calls and its random lengths, at a sixteenth of their size.
    folder = copy_tiny(config=dict(max_position_embeddings=4096))
    seed(0)
    llm = LLM(str(folder) + "/", enforce_eager=False, max_model_len=4096)
    prompts = [[randint(0, 1000) for _ in range(randint(6, 64))] for _ in range(16)]
    params = [
        SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=randint(6, 64))
        for _ in range(16)
    ]
    llm.generate(["Benchmark: "], SamplingParams())
    start = time.time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert time.time() > start
    assert [len(output["token_ids"]) for output in outputs] == [p.max_tokens for p in params]
