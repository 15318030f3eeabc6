"""Throughput of nanovllm and its peers, beside the ideal of the machine.

python bench.py --workload readme --shape qwen3-0.6b
python bench.py --workload cpu --engine nanovllm transformers vllm=ITS_VENV/bin/python
python bench.py --model FOLDER --input-len 512 --output-len 128 --num-prompts 64
python bench.py --workload readme --trace run.json.gz

Each engine runs in a process of its own with its defaults: import and construct it, generate a few
tokens, then the workload twice; the better run counts. Weights are random unless --model names a
checkpoint; every request generates its full number of tokens (ignore_eos). Nothing is installed
here: an engine comes from this interpreter, or from the interpreter given after "=" (nanovllm's
code is always the code beside this file).

--breakdown says where nanovllm's time went: it runs the workload once more, under torch's profiler.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanovllm.core.model_config import ModelConfig
from tools.breakdown import Work, measure, print_breakdown

TEMPERATURE = 0.6
MAX_MODEL_LEN = 4096
ENGINES = ("nanovllm", "vllm", "transformers")
STATIC_BATCH = 32  # prompts that transformers generates for at a time
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=True,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    ),
    "qwen3-8b": dict(
        model_type="qwen3",
        architectures=["Qwen3ForCausalLM"],
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=False,
        max_position_embeddings=40960,
        rope_theta=1000000.0,
        rms_norm_eps=1e-6,
    ),
    "llama-3.2-1b": dict(
        model_type="llama",
        architectures=["LlamaForCausalLM"],
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        tie_word_embeddings=True,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        rms_norm_eps=1e-5,
    ),
}


# What is run


@dataclass(frozen=True)
class Workload:
    """Prompts as token ids, and the number of tokens that each must generate. The first
    `shared_len` tokens are the same in all prompts."""

    prompts: list[list[int]]
    output_lens: list[int]
    shared_len: int = 0

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.output_lens)

    @property
    def max_len(self) -> int:
        return max(len(p) + n for p, n in zip(self.prompts, self.output_lens, strict=True))

    def prompts_of_run(self, run: int, vocab_size: int) -> list[list[int]]:
        """The prompts of a run. The second run has other tokens, so that it takes no prefix hits;
        with a shared prefix it has the same tokens, so that the prefix cache is warm."""
        shift = 0 if self.shared_len else run
        return [[(token + shift) % vocab_size for token in prompt] for prompt in self.prompts]


def make_workload(name: str) -> Workload:
    """The seven workloads; always the same tokens.

    readme is nano-vllm's benchmark, long prompts and long answers; short has many small requests,
    where overhead shows, and queue 4,096 of them, more than run at a time; prefix has 512
    questions after one system prompt; bs1 is the latency of one request; docs has long prompts and
    short answers, so prompts bound it; cpu is for two CPU cores.
    """
    rng = random.Random(0)

    def tokens(least: int, most: int) -> list[int]:
        return [rng.randint(0, 10000) for _ in range(rng.randint(least, most))]

    if name == "prefix":
        system = [rng.randint(0, 10000) for _ in range(2048)]
        return Workload([system + tokens(32, 96) for _ in range(512)], [128] * 512, shared_len=2048)
    if name == "bs1":
        return Workload([[rng.randint(0, 10000) for _ in range(128)]], [512])
    number, input_range, output_range = {
        "readme": (256, (100, 1024), (100, 1024)),
        "short": (1024, (16, 128), (16, 128)),
        "queue": (4096, (16, 128), (16, 128)),
        "docs": (256, (1500, 3500), (16, 16)),
        "cpu": (32, (32, 128), (16, 64)),
    }[name]
    prompts = [tokens(*input_range) for _ in range(number)]
    return Workload(prompts, [rng.randint(*output_range) for _ in range(number)])


def uniform_workload(input_len: int, output_len: int, num_prompts: int) -> Workload:
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(input_len)] for _ in range(num_prompts)]
    return Workload(prompts, [output_len] * num_prompts)


# The ideal


@dataclass(frozen=True)
class Ideal:
    """The time of a perfect engine: for each step the longer of moving and computing. A step reads
    the weights once, each request's keys and values once, and a shared prefix once.

    Args:
        itemsize: bytes of a weight, key or value.
        bandwidth: bytes a second.
        flops: operations a second.
    """

    model: ModelConfig
    itemsize: int
    bandwidth: float
    flops: float

    def step(self, work: Work) -> float:
        return self._seconds(self._products(work), self._attention(work))

    def products(self, work: Work) -> float:
        return self._seconds(self._products(work))

    def attention(self, work: Work) -> float:
        return self._seconds(self._attention(work))

    def _seconds(self, *parts: tuple[float, float]) -> float:
        moved, ops = map(sum, zip(*parts, strict=True))
        return max(self.itemsize * moved / self.bandwidth, ops / self.flops)

    def _products(self, work: Work) -> tuple[float, float]:
        """Weights read, and operations."""
        model = self.model
        q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        projections = model.hidden_size * (2 * q_size + 2 * kv_size + 3 * model.intermediate_size)
        layers, head = model.num_layers * projections, model.vocab_size * model.hidden_size
        return layers + head, 2 * layers * work.new_tokens + 2 * head * work.sampled

    def _attention(self, work: Work) -> tuple[float, float]:
        model = self.model
        pair_ops = 4 * model.num_layers * model.num_heads * model.head_dim
        return model.kv_elements_per_token * work.keys_read, pair_ops * work.pairs


def ideal_seconds(workload: Workload, ideal: Ideal, warm: bool = False) -> float:
    """The time of a perfect engine: all prompts in one step, then all requests decode together.

    Args:
        warm: the prefix cache holds all prompts that share a prefix.
    """
    lens = [len(prompt) for prompt in workload.prompts]
    shared = workload.shared_len
    cached = [n - 1 if warm and shared else shared for n in lens]
    if not warm:
        cached[0] = 0  # the first request computes the shared prefix
    prefill = Work(
        new_tokens=sum(lens) - sum(cached),
        pairs=sum((n * n - c * c) / 2 for n, c in zip(lens, cached, strict=True)),
        keys_read=sum(cached) - shared * max(0, sum(c > 0 for c in cached) - 1),
        sampled=len(lens),
    )
    seconds = ideal.step(prefill)
    for produced in range(1, max(workload.output_lens)):
        contexts = [
            n + produced
            for n, wanted in zip(lens, workload.output_lens, strict=True)
            if wanted > produced
        ]
        decode = Work(
            new_tokens=len(contexts),
            pairs=sum(contexts),
            keys_read=sum(contexts) - shared * (len(contexts) - 1),
            sampled=len(contexts),
        )
        seconds += ideal.step(decode)
    return seconds


def measure_machine(job: dict[str, Any]) -> dict[str, float]:
    """Bytes a second that a sum over a large tensor reads, and operations a second of a large
    matrix product, each the best of several."""
    import torch

    device, dtype = job["device"], getattr(torch, job["dtype"])
    on_gpu = device != "cpu"

    def fastest(function: Callable[[], Any], at_least: float = 1.0) -> float:
        times: list[float] = []
        while len(times) < 4 or sum(times) < at_least:
            start = time.perf_counter()
            function()
            if on_gpu:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return min(times[1:])

    size = 8192 if on_gpu else 2048
    data = torch.ones(2**30 if on_gpu else 2**28, dtype=torch.float32, device=device)
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return {
        "bandwidth": data.numel() * data.itemsize / fastest(data.sum),
        "flops": 2 * size**3 / fastest(lambda: a @ b),
    }


# Engines. A loader imports and constructs one, and returns a function that generates, a function
# that reports, and the engine.

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
Report = Callable[[], dict[str, Any]]


def load_vllm_like(job: dict[str, Any]) -> tuple[Generate, Report, Any]:
    """Load nanovllm or vLLM, by the same calls."""
    engine = importlib.import_module(job["engine"])
    options = job["options"] | ({"load_format": "dummy"} if job["dummy_weights"] else {})
    llm = engine.LLM(
        job["model"],
        dtype=job["dtype"],
        max_model_len=job["max_model_len"],
        skip_tokenizer_init=True,
        **options,
    )

    sampling = {"temperature": TEMPERATURE, "ignore_eos": True} | job["sampling"]

    def generate(prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        params = [engine.SamplingParams(**sampling, max_tokens=n) for n in output_lens]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(inputs, params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def report() -> dict[str, Any]:
        if job["engine"] == "vllm":
            config = llm.llm_engine.vllm_config
            return {"device": config.device_config.device_type, "dtype": config.model_config.dtype}
        executor, metrics = llm.llm_engine.executor, llm.llm_engine.metrics
        return {
            "device": executor.device.type,
            "dtype": executor.dtype,
            "kv_cache_waste": metrics.kv_cache_waste,
        }

    return generate, report, llm


def load_transformers(job: dict[str, Any]) -> tuple[Generate, Report, Any]:
    """Load transformers, whose generate runs static batches with prompts padded on the left; a
    batch runs until its longest answer ends."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(job["model"])
    dtype = config.dtype if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    if job["dummy_weights"]:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def generate_batch(prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        padded = [[0] * (longest - len(p)) + p for p in prompts]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in prompts]
        model.generation_config = GenerationConfig(
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            max_new_tokens=max(output_lens),
            eos_token_id=None,
            pad_token_id=0,
        )
        tokens = model.generate(
            torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(mask, device=model.device),
        )[:, longest:].tolist()
        return [row[:n] for row, n in zip(tokens, output_lens, strict=True)]

    def generate(prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        outputs = []
        for i in range(0, len(prompts), STATIC_BATCH):
            batch = slice(i, i + STATIC_BATCH)
            outputs += generate_batch(prompts[batch], output_lens[batch])
        return outputs

    return generate, lambda: {"device": model.device.type, "dtype": model.dtype}, model


def measure_engine(job: dict[str, Any]) -> dict[str, Any]:
    """Start time, the times of both runs, the engine's own report, and with --breakdown where the
    time of a third run went."""
    workload = Workload(**job["workload"])
    start = time.perf_counter()
    load = load_transformers if job["engine"] == "transformers" else load_vllm_like
    generate, report, llm = load(job)
    start_seconds = time.perf_counter() - start
    generate([[1, 2, 3, 4]], [4])
    run_seconds = []
    for run in range(2):
        prompts = workload.prompts_of_run(run, job["vocab_size"])
        start = time.perf_counter()
        outputs = generate(prompts, workload.output_lens)
        run_seconds.append(time.perf_counter() - start)
        assert [len(tokens) for tokens in outputs] == workload.output_lens
    result = report()
    if result["device"] == "cuda":
        import torch

        cards = map(torch.cuda.mem_get_info, range(torch.cuda.device_count()))
        result["gpu_bytes"] = sum(total - free for free, total in cards)
    if job["breakdown"]:
        result["peak_bytes"] = peak_bytes(resource.getrusage(resource.RUSAGE_SELF))
        prompts = workload.prompts_of_run(2, job["vocab_size"])
        result["breakdown"] = measure(
            llm,
            lambda: generate(prompts, workload.output_lens),
            workload.shared_len,
            Path(job["trace"]) if job["trace"] else None,
        )
    return {
        **result,
        "dtype": str(result["dtype"]).removeprefix("torch."),
        "version": importlib.import_module(job["engine"]).__version__,
        "start_seconds": start_seconds,
        "run_seconds": run_seconds,
    }


# Processes. Each job starts this file again, perhaps by another interpreter.


def peak_bytes(usage: resource.struct_rusage) -> int:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def child_main(folder: Path) -> None:
    job = json.loads(folder.joinpath("job.json").read_text())
    measure = measure_machine if job["engine"] == "machine" else measure_engine
    folder.joinpath("result.json").write_text(json.dumps(measure(job)))


def run_job(job: dict[str, Any], python: str) -> dict[str, Any]:
    """Run a job in a new process with empty kernel caches.

    Returns: the job's result, with the peak memory of its largest process if the result has none.
        gpu_bytes is the memory that all processes hold on the GPUs at the end.

    Raises:
        RuntimeError: the job failed; with the last lines that it printed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.joinpath("job.json").write_text(json.dumps(job))
        result, log = folder / "result.json", folder / "log"
        caches = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT")
        env = os.environ | {cache: str(folder / cache) for cache in caches}
        command = [python, __file__, "--child", name]
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
            except BaseException:  # end the process with all processes that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if process.returncode or not result.exists():
            lines = log.read_text(errors="replace").splitlines()
            causes = [line for line in lines[:-5] if "Error: " in line][:5]
            ending = f"{python} ended with {process.returncode}:"
            raise RuntimeError("\n".join([ending, *causes, *lines[-5:]]))
        return {"peak_bytes": peak_bytes(usage)} | json.loads(result.read_text())


# The report


def measure_all(args: argparse.Namespace) -> dict[str, Any]:
    workload, config = args.workload, args.config
    job = {
        "workload": asdict(workload),
        "model": args.model,
        "dummy_weights": args.dummy_weights,
        "dtype": args.dtype,
        "options": dict(args.option),
        "sampling": dict(args.sampling),
        "vocab_size": config.vocab_size,
        "max_model_len": args.max_model_len,
        "trace": args.trace,
    }
    machines: dict[str, dict[str, float]] = {}
    engines: dict[str, dict[str, Any]] = {}
    for name, python in args.engine:
        print(f"{name} runs ...", file=sys.stderr)
        try:
            breakdown = args.breakdown and name == "nanovllm"
            result = run_job(job | {"engine": name, "breakdown": breakdown}, python)
            engines[name] = result
            rates = machine_rates(machines, result["device"], result["dtype"], python)
        except RuntimeError as error:
            print(f"{name} failed. {error}", file=sys.stderr)
            engines[name] = {"failed": True}
            continue
        seconds = min(result["run_seconds"])
        ideal = Ideal(config, ITEMSIZE[result["dtype"]], **rates)
        ideal_run = ideal_seconds(workload, ideal, warm=seconds == result["run_seconds"][1])
        result |= {
            "seconds": seconds,
            "tokens_per_second": workload.output_tokens / seconds,
            "ideal_seconds": ideal_run,
            "share_of_ideal": ideal_run / seconds,
        }
        if breakdown:
            works = [Work(*work) for work in result["breakdown"].pop("work")]
            ideals = {"products": ideal.products, "attention": ideal.attention, "all": ideal.step}
            result["breakdown"]["ideals"] = {
                part: sum(map(seconds_of, works)) for part, seconds_of in ideals.items()
            }
    return {
        "workload": args.workload_name,
        "requests": len(workload.prompts),
        "input_tokens": workload.input_tokens,
        "output_tokens": workload.output_tokens,
        "model": args.model_name,
        "options": dict(args.option),
        "sampling": dict(args.sampling),
        "machines": machines,
        "engines": engines,
    }


def machine_rates(
    machines: dict[str, dict[str, float]], device: str, dtype: str, python: str
) -> dict[str, float]:
    """The machine's rates, measured once for each device and dtype; all dtypes of a device share
    one bandwidth."""
    kind = f"{device} {dtype}"
    if kind not in machines:
        rates = run_job({"engine": "machine", "device": device, "dtype": dtype}, python)
        for other, known in machines.items():
            if other.startswith(device):
                rates["bandwidth"] = known["bandwidth"]
        machines[kind] = {name: rates[name] for name in ("bandwidth", "flops")}
    return machines[kind]


def print_table(report: dict[str, Any]) -> None:
    print(
        f"\n{report['workload']}: {report['requests']} requests, {report['input_tokens']:,} tokens "
        f"in, {report['output_tokens']:,} out; {report['model']}"
        + "".join(
            f", {name}={value}" for name, value in (report["options"] | report["sampling"]).items()
        )
    )
    for kind, rates in report["machines"].items():
        print(
            f"this machine, {kind}: reads {rates['bandwidth'] / 1e9:,.1f} GB/s, multiplies "
            f"{rates['flops'] / 1e9:,.0f} GFLOP/s"
        )
    header = ("dtype", "tok/s", "run 1 s", "run 2 s", "ideal s", "of ideal", "start s", "peak GiB")
    print(("{:<24}" + "{:>10}" * 10).format("engine", *header, "GPU GiB", "KV waste"))
    for name, result in report["engines"].items():
        if "failed" in result:
            print(f"{name:<24}    failed")
            continue
        gpu_bytes, waste = result.get("gpu_bytes"), result.get("kv_cache_waste")
        print(
            f"{name + ' ' + result['version'][:10]:<24}{result['dtype']:>10}"
            f"{result['tokens_per_second']:>10,.1f}"
            f"{result['run_seconds'][0]:>10.2f}{result['run_seconds'][1]:>10.2f}"
            f"{result['ideal_seconds']:>10.2f}{result['share_of_ideal']:>10.0%}"
            f"{result['start_seconds']:>10.1f}{result['peak_bytes'] / 2**30:>10.2f}"
            + (f"{'':>10}" if gpu_bytes is None else f"{gpu_bytes / 2**30:>10.2f}")
            + ("" if waste is None else f"{waste:>10.1%}")
        )
    speeds = {
        name: result["tokens_per_second"]
        for name, result in report["engines"].items()
        if "failed" not in result
    }
    first = next(iter(speeds), None)
    for name in list(speeds)[1:]:
        print(f"{first} / {name}: {speeds[first] / speeds[name]:.2f}")
    for result in report["engines"].values():
        if "breakdown" in result:
            print_breakdown(result["breakdown"], result["seconds"])


# The command line


def engine_spec(text: str) -> tuple[str, str]:
    name, _, python = text.partition("=")
    if name not in ENGINES:
        raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(ENGINES)}")
    found = shutil.which(python or sys.executable)
    if found is None:
        raise argparse.ArgumentTypeError(f"{python!r} is no program that can be run")
    return name, found


def engine_option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def trace_file(text: str) -> str:
    path = Path(text).absolute()
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is no file that can be written")
    return str(path)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def parse_args(folder: Path) -> argparse.Namespace:
    """Parse the command line, make the workload and find the model; a shape's config.json is
    written to `folder`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    workloads = ("readme", "short", "queue", "prefix", "bs1", "docs", "cpu")
    parser.add_argument("--workload", choices=workloads, help="default: cpu")
    own = parser.add_argument_group("a workload of your own", "all prompts and answers alike")
    own.add_argument("--input-len", type=positive, help="tokens a prompt (default 128)")
    own.add_argument("--output-len", type=positive, help="tokens an answer (default 128)")
    own.add_argument("--num-prompts", type=positive, help="requests (default 32)")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=SHAPES, help="random weights (default qwen3-0.6b)")
    model.add_argument("--model", help="a checkpoint folder")
    parser.add_argument(
        "--engine",
        nargs="+",
        action="extend",
        type=engine_spec,
        metavar="NAME[=PYTHON]",
        help=f"{', '.join(ENGINES)}; the first is compared with each of the others",
    )
    parser.add_argument(
        "--option",
        nargs="+",
        action="extend",
        type=engine_option,
        default=[],
        metavar="NAME=VALUE",
        help="options for LLM of nanovllm and vLLM, values as in JSON; by default their defaults",
    )
    parser.add_argument(
        "--sampling",
        nargs="+",
        action="extend",
        type=engine_option,
        default=[],
        metavar="NAME=VALUE",
        help="more SamplingParams of nanovllm and vLLM, as top_p=0.9 logprobs=5",
    )
    parser.add_argument("--dtype", choices=("auto", *ITEMSIZE), default="auto")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--breakdown", action="store_true", help="say where nanovllm's time went")
    parser.add_argument(
        "--trace",
        type=trace_file,
        metavar="FILE",
        help="the same, and a timeline for ui.perfetto.dev; gzipped if it ends in .gz",
    )
    args = parser.parse_args()
    args.engine = args.engine or [engine_spec("nanovllm")]
    for flag in ("engine", "option", "sampling"):
        pairs = getattr(args, flag)
        if len(dict(pairs)) < len(pairs):
            parser.error(f"--{flag} names one twice")
    if args.sampling and not set(dict(args.engine)) <= {"nanovllm", "vllm"}:
        parser.error("--sampling is for nanovllm and vLLM alone")
    args.breakdown |= args.trace is not None
    if args.breakdown and "nanovllm" not in dict(args.engine):
        parser.error("--breakdown and --trace see only into nanovllm, which --engine doesn't name")

    own_lens = (args.input_len, args.output_len, args.num_prompts)
    if any(own_lens) and args.workload:
        parser.error("--workload excludes --input-len, --output-len and --num-prompts")
    args.workload_name = "own" if any(own_lens) else args.workload or "cpu"
    if any(own_lens):
        defaults = (128, 128, 32)
        args.workload = uniform_workload(*(n or d for n, d in zip(own_lens, defaults, strict=True)))
    else:
        args.workload = make_workload(args.workload_name)

    args.dummy_weights = args.model is None
    args.model_name = args.model or f"{args.shape or 'qwen3-0.6b'} with random weights"
    if args.dummy_weights:
        shape = SHAPES[args.shape or "qwen3-0.6b"] | {"dtype": "bfloat16", "hidden_act": "silu"}
        folder.joinpath("config.json").write_text(json.dumps(shape))
        args.model = str(folder)
    try:
        hf_config = json.loads(Path(args.model, "config.json").read_text())
        args.config = ModelConfig.from_hf(hf_config)
    except (OSError, ValueError) as error:
        parser.error(f"--model {args.model}: {error}")
    longest, limit = args.workload.max_len, args.config.max_position_embeddings
    if longest > limit:
        parser.error(f"a request of {longest} tokens is too long: the model takes {limit}")
    args.max_model_len = min(max(MAX_MODEL_LEN, longest), limit)
    return args


def main() -> int:
    if sys.argv[1:2] == ["--child"]:
        child_main(Path(sys.argv[2]))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory() as folder:
        args = parse_args(Path(folder))
        report = measure_all(args)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        print_table(report)
    return int(any("failed" in result for result in report["engines"].values()))


if __name__ == "__main__":
    sys.exit(main())
