"""EngineArgs and the parser of the command line, as vLLM's scripts use them."""

import pickle
from dataclasses import asdict, fields

import pytest

from nanovllm import AsyncEngineArgs, EngineArgs, FlexibleArgumentParser
from nanovllm.arguments import whole_number
from nanovllm.config import VLLM_DEFAULTS, EngineConfig, options_of
from nanovllm.entrypoints import cli


def parse(words, cls=EngineArgs):
    return cls.from_cli_args(cls.add_cli_args(FlexibleArgumentParser()).parse_args(words))


def test_engine_args_have_every_option():
    args = EngineArgs("folder", max_num_seqs=3, stream_interval=2)
    assert (args.model, args.max_num_seqs, args.stream_interval) == ("folder", 3, 2)
    names = {f.name for f in fields(EngineArgs)}
    assert names == {f.name for f in fields(EngineConfig)} | set(VLLM_DEFAULTS) - {
        "enable_log_requests"
    }
    assert {f.name for f in fields(AsyncEngineArgs)} == names | {"enable_log_requests"}
    assert isinstance(AsyncEngineArgs(), EngineArgs)
    assert pickle.loads(pickle.dumps(args)) == args
    with pytest.raises(TypeError, match="max_num_seq"):
        EngineArgs(max_num_seq=3)


def test_their_defaults_ask_for_nothing(caplog):
    for args in (EngineArgs("folder"), AsyncEngineArgs("folder"), parse(["--model", "folder"])):
        assert EngineConfig.from_options(**asdict(args)) == EngineConfig(model="folder")
    assert EngineConfig.from_options(**options_of(EngineArgs())).model == "Qwen/Qwen3-0.6B"
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "number"),
    [("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.6k", 25600), ("64M", 64 << 20),
     ("1.5g", 1_500_000_000), ("2G", 2 << 30), ("2T", 2 << 40), ("0.3m", 300_000), (" 7 ", 7),
     ("-1", -1)],
)  # fmt: skip
def test_numbers_are_written_as_people_do(text, number):
    assert whole_number(text) == number
    assert parse(["--kv-cache-memory-bytes", text]).kv_cache_memory_bytes == number


@pytest.mark.parametrize("text", ["1.5K", "k", "1kk", "1e3", "x", "", "1.5"])
def test_other_numbers_are_refused(text, capsys):
    with pytest.raises(SystemExit):
        parse(["--max-num-seqs", text])
    assert "max-num-seqs" in capsys.readouterr().err


def test_the_command_line_gives_engine_args():
    args = parse(
        [
            *(
                "--model",
                "folder",
                "--max_model_len",
                "2k",
                "-tp",
                "1",
                "--no-enable-chunked-prefill",
            ),
            *("--profiler-config.profiler", "torch", "--profiler_config.torch_profiler_dir=a_b"),
            *("--hf-overrides", '{"a": {"b": 1}}', "--quantization", "fp8", "--seed=5"),
            *("--limit_mm_per_prompt.image", "0", "--compilation-config.pass_config.x", "true"),
        ],
        AsyncEngineArgs,
    )
    assert (args.model, args.max_model_len, args.tensor_parallel_size) == ("folder", 2000, 1)
    assert args.profiler_config == {"profiler": "torch", "torch_profiler_dir": "a_b"}
    assert (args.hf_overrides, args.quantization, args.seed) == ({"a": {"b": 1}}, "fp8", 5)
    assert args.limit_mm_per_prompt == {"image": 0}
    assert args.compilation_config == {"pass_config": {"x": True}}
    assert parse(["--no-enable-chunked-prefill"]).enable_chunked_prefill is False
    assert args.enable_log_requests is False and args.enforce_eager is False
    assert parse(["--max-model-len", "auto"]).max_model_len is None
    assert (
        EngineConfig.from_options(**asdict(parse(["--max-model-len", "-1"]))).max_model_len is None
    )


def test_only_the_asynchronous_options():
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(), async_args_only=True)
    assert vars(parser.parse_args([])) == {"enable_log_requests": False}
    assert AsyncEngineArgs.from_cli_args(parser.parse_args(["--enable-log-requests"])) == (
        AsyncEngineArgs(enable_log_requests=True)
    )


def test_a_scripts_own_options_are_read_likewise():
    parser = FlexibleArgumentParser(description="a script")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num_prompts", type=int, default=3)
    group.add_argument("--top-p", type=float)
    parser.add_argument("texts", nargs="*")
    parser.set_defaults(top_p=0.5)
    args = parser.parse_args(["--num-prompts", "2K", "a", "--", "--top_p"])
    assert (args.num_prompts, args.top_p, args.texts) == (2048, 0.5, ["a", "--top_p"])
    assert parser.parse_args(["--num_prompts=1k", "--top_p", "0.1"]).top_p == 0.1
    assert parser.parse_known_args(["--other_name=x.y"])[1] == ["--other_name=x.y"]


def test_our_command_line_takes_vllms_options(monkeypatch):
    given = {}
    monkeypatch.setattr("nanovllm.llm.LLM", lambda **options: given.update(options))
    words = ["generate", "--model", "m", "--max_model_len", "1K", "--enable-chunked-prefill"]
    cli.load(cli._parser().parse_args([*words, "--swap-space", "4", "--max-num-seqs=auto"]))
    assert given == {"model": "m", "max_model_len": 1024, "enable_chunked_prefill": True,
                     "swap_space": 4, "max_num_seqs": None}  # fmt: skip
