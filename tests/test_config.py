"""EngineConfig: the options of LLM. ModelConfig: what a config.json may say."""

import json
import logging
import math
import re
from dataclasses import make_dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanovllm.config import (
    _VLLM,
    ALSO_FINE,
    SPEED_ONLY,
    VLLM_DEFAULTS,
    EngineConfig,
    ProfilerConfig,
    options_of,
    plain,
)
from nanovllm.core.model_config import ModelConfig, token_id_tuple


@pytest.fixture
def hf(tiny):
    """The config.json of the model in the box."""
    return json.loads((tiny / "config.json").read_text())


# Options


def test_defaults_are_vllms():
    config = EngineConfig.from_options(Path("folder"))
    assert (config.model, config.dtype, config.load_format) == ("folder", "auto", "auto")
    assert (config.gpu_memory_utilization, config.seed) == (0.92, 0)
    assert (config.tensor_parallel_size, config.enforce_eager) == (1, False)
    assert config.max_model_len is None and config.kv_cache_memory_bytes is None


@pytest.mark.parametrize(
    ("given", "meant"),
    [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16"),
     (torch.bfloat16, "bfloat16"), (torch.float32, "float32")],
)  # fmt: skip
def test_dtype_names(given, meant):
    assert EngineConfig.from_options("folder", dtype=given).dtype == meant


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_model_length", "unknown option 'max_model_length'; did you mean 'max_model_len'?"),
        ("max_num_seq", "did you mean 'max_num_seqs'?"),
        ("tensor_paralel_size", "did you mean 'tensor_parallel_size'?"),
        ("qqqqq", "unknown option 'qqqqq'"),
    ],
)
def test_an_unknown_option_suggests_the_nearest_name(name, message):
    with pytest.raises(TypeError, match=re.escape(message) + "$"):
        EngineConfig.from_options("folder", **{name: 1})


COUNT = "{name} must be a whole number of at least 1, got {value!r}"
STRING = "{name} must be a string, got {value!r}"
SWITCH = "{name} must be True or False, got {value!r}"
SWITCHES = ["enforce_eager", "enable_prefix_caching", "async_scheduling", "skip_tokenizer_init"]
SWITCHES += ["trust_remote_code"]
REFUSED = [
    ("dtype", ["int8", "float64", None, torch.int8], "dtype must be one of auto, float32, float,"),
    ("max_model_len", [0, "9"], COUNT),
    ("max_num_seqs", [-1, True], COUNT),
    ("max_num_batched_tokens", [1.5], COUNT),
    ("block_size", [0], COUNT),
    ("kv_cache_memory_bytes", [0, 1e9], COUNT),
    ("num_gpu_blocks_override", [0, 1.5], COUNT),
    ("tensor_parallel_size", [0], COUNT),
    ("tensor_parallel_size", [2], "tensor_parallel_size=2 is not supported yet; use 1"),
    ("gpu_memory_utilization", [0, 1.1, math.nan, "x", None], "{name} must be a number in (0, 1]"),
    (
        "load_format",
        ["gguf"],
        "must be 'auto', 'safetensors' or 'hf' (safetensors files), or 'dumm",
    ),
    ("attention_backend", ["XFORMERS"], "must be one of 'auto', 'TORCH_SDPA', 'TRITON_ATTN'"),
    ("seed", [1.0, "0", True, 2**63, -(2**63) - 1], "{name} must be a whole number of 64 bits"),
    *[(name, [0, None], STRING) for name in ("device", "load_format")],
    *[(name, [5], STRING) for name in ("tokenizer", "revision", "attention_backend")],
    *[(name, [1, "yes"], SWITCH) for name in SWITCHES],
    ("model", [None, 5, ["folder"], b"folder"], "model must be a folder or a hub name, got"),
]


@pytest.mark.parametrize(
    ("name", "value", "message"), [(n, v, m) for n, values, m in REFUSED for v in values]
)
def test_a_value_that_will_not_do_is_refused(name, value, message):
    error = TypeError if message in (STRING, SWITCH) or name == "model" else ValueError
    with pytest.raises(error, match=re.escape(message.format(name=name, value=value))):
        EngineConfig.from_options(**{"model": "folder", name: value})


def test_the_token_budget_holds_a_token_of_every_running_request():
    message = r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(9\)"
    with pytest.raises(ValueError, match=message):
        EngineConfig.from_options("folder", max_num_batched_tokens=8, max_num_seqs=9)


def test_vllms_defaults_spelled_out_are_silent(caplog):
    ours = set(EngineConfig.__dataclass_fields__)
    assert set(VLLM_DEFAULTS) >= SPEED_ONLY and not ours & set(VLLM_DEFAULTS)
    EngineConfig.from_options("folder", **VLLM_DEFAULTS)
    EngineConfig.from_options("folder", **dict.fromkeys(VLLM_DEFAULTS))
    for name, values in ALSO_FINE.items():
        for value in values:
            EngineConfig.from_options("folder", **{name: value})
    assert not caplog.records


def as_object(name, value):
    """A value of vLLM's EngineArgs as its own classes have it: config objects, enums, sets."""
    if name == "mamba_backend":
        return Enum(name, {value: "vllm.some.Class"})[value]
    if isinstance(value, dict) and value:
        values = {k: as_object(k, v) for k, v in value.items()}
        return make_dataclass(name, values)(**values)
    return set(value) if name.endswith("offload_params") else value


def vllms_engine_args():
    """vLLM's EngineArgs at its defaults, with our options as vLLM has them."""
    args = {name: as_object(name, value) for name, value in VLLM_DEFAULTS.items()}
    args |= {"model": "folder", "hf_overrides": {}, "override_generation_config": {}}
    args |= {"_api_process_count": 1, "max_model_len": None, "attention_backend": None}
    profiler = _VLLM["config_objects"]["profiler_config"]
    return SimpleNamespace(**args, profiler_config=as_object("Profiler", profiler))


def test_vllms_own_engine_args_ask_for_nothing(caplog):
    args = vllms_engine_args()
    assert args.structured_outputs_config.backend == "auto" and args.offload_params == set()
    assert args.kernel_config.ir_op_priority.rms_norm == []
    config = EngineConfig.from_options(**options_of(args))
    assert config == EngineConfig(model="folder", profiler_config={}, hf_overrides={},
                                  override_generation_config={})  # fmt: skip
    assert not caplog.records


def test_a_changed_entry_of_vllms_objects_is_named(caplog):
    args = vllms_engine_args()
    args.structured_outputs_config.backend = "outlines"
    with pytest.raises(ValueError, match=r"config={'backend': 'outlines'} is not supported yet"):
        EngineConfig.from_options(**options_of(args))
    args.structured_outputs_config.backend = "guidance"
    args.compilation_config.pass_config.enable_sp = True
    args.profiler_config.profiler, args.profiler_config.torch_profiler_dir = "torch", "here"
    args.attention_backend = Enum("Backend", {"TRITON_ATTN": "vllm.some.Class"}).TRITON_ATTN
    config = EngineConfig.from_options(**options_of(args))
    assert config.profiler_config == {"profiler": "torch", "torch_profiler_dir": "here"}
    assert config.attention_backend == "TRITON_ATTN"
    assert "compilation_config={'pass_config': {'enable_sp': True}}" in caplog.text


def test_the_table_is_vllms():
    arg_utils = pytest.importorskip("vllm.engine.arg_utils")
    defaults = {name: plain(value) for name, value in vars(arg_utils.EngineArgs()).items()}
    assert {name: v for name, v in VLLM_DEFAULTS.items() if name in defaults} == {
        name: v for name, v in defaults.items() if name in VLLM_DEFAULTS
    }


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("distributed_executor_backend", "mp"),
        ("limit_mm_per_prompt", {}),
        ("logits_processors", []),
        ("compilation_config", {}),
        ("ignore_patterns", ["original/**/*"]),
        ("quantization", None),
        ("structured_outputs_config", {"backend": "auto"}),
        ("load_format", "hf"),
        ("trust_remote_code", True),
    ],
)
def test_a_value_that_asks_for_nothing_is_fine(name, value, caplog):
    EngineConfig.from_options("folder", **{name: value})
    assert not caplog.records


@pytest.mark.parametrize("value", [None, -1, "auto"])
def test_the_length_may_be_left_to_the_engine(value):
    assert EngineConfig.from_options("folder", max_model_len=value).max_model_len is None


def test_a_profiler_config_is_an_object_or_a_dict():
    for config in (ProfilerConfig("torch", "here"), vars(ProfilerConfig("torch", "here"))):
        options = EngineConfig.from_options("folder", profiler_config=config)
        assert options.profiler_config == {"profiler": "torch", "torch_profiler_dir": "here"}
    with pytest.raises(ValueError, match="profiler_config must be"):
        EngineConfig.from_options("folder", profiler_config={"torch_profiler_with_flops": True})


@pytest.mark.parametrize(
    ("name", "value"),
    [("swap_space", 3), ("enable_chunked_prefill", False), ("compilation_config", 3),
     ("performance_mode", "throughput")],
)  # fmt: skip
def test_an_option_that_only_tunes_speed_warns(name, value, caplog):
    EngineConfig.from_options("folder", **{name: value})
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{name}={value!r} has no effect here" in record.getMessage()


@pytest.mark.parametrize(
    ("name", "value", "default"),
    [
        ("quantization", "awq", None),
        ("kv_cache_dtype", "fp8", "auto"),
        ("pipeline_parallel_size", 2, 1),
        ("cpu_offload_gb", 4, 0),
        ("enable_lora", True, False),
        ("limit_mm_per_prompt", {"image": 1}, {}),
        ("speculative_config", {"method": "ngram"}, None),
    ],
)
def test_an_option_that_would_change_results_or_memory_is_refused(name, value, default):
    message = f"{name}={value!r} is not supported yet; leave it out (vLLM's default is {default!r})"
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig.from_options("folder", **{name: value})


def test_a_class_of_logits_processors_is_told_of_functions():
    class Processor:
        pass

    for given in ([Processor], ["module:Processor"]):
        with pytest.raises(ValueError, match=r"SamplingParams\(logits_processors=\[f\]\)"):
            EngineConfig.from_options("folder", logits_processors=given)


# config.json


def test_the_model_in_the_box_is_read(hf):
    config = ModelConfig.from_hf(hf)
    assert (config.architecture, config.dtype) == ("Qwen3ForCausalLM", "bfloat16")
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 64)
    assert config.kv_elements_per_token == 2 * config.num_layers * 2 * 64
    assert config.tie_word_embeddings and config.eos_token_ids == (2,)
    assert (config.rope.rope_type, config.rope.theta) == ("default", 10000.0)


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (2, (2,)), (0, (0,)), ([2, 0], (2, 0))])
def test_eos_is_one_id_or_several(value, ids):
    assert token_id_tuple(value) == ids


@pytest.mark.parametrize("value", [None, [], "Qwen3ForCausalLM", ["A", "B"]])
def test_config_without_one_architecture_is_refused(hf, value):
    with pytest.raises(ValueError, match="must name one architecture in 'architectures', got"):
        ModelConfig.from_hf(hf | {"architectures": value})


SIZES = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "max_position_embeddings"]  # fmt: skip
NO_SIZES = [None, 0, -1, "8", 8.0, True]


@pytest.mark.parametrize(
    ("key", "value"),
    [(key, value) for key in SIZES for value in NO_SIZES]
    + [(key, value) for key in ("num_key_value_heads", "head_dim") for value in NO_SIZES[1:]],
)
def test_a_missing_or_impossible_size_is_named(hf, key, value):
    hf[key] = value
    if value is None:
        del hf[key]
    with pytest.raises(ValueError, match=f"'{key}' must be a positive whole number, got {value!r}"):
        ModelConfig.from_hf(hf)


PARTIAL = {"rope_type": "default", "partial_rotary_factor": 0.25}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "activation 'gelu' is not supported; supported: 'silu'"),
        ({"layer_types": ["sliding_attention"]}, "sliding-window attention is not supported"),
        (
            {"use_sliding_window": True, "sliding_window": 128},
            "sliding-window attention is not supported",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "(quant_method 'gptq')"),
        ({"num_key_value_heads": 3}, "(4) must be a multiple of num_key_value_heads (3)"),
        ({"head_dim": 63}, "head_dim must be even for RoPE, got 63"),
        ({"hidden_size": 255, "head_dim": None}, "without head_dim, hidden_size (255) must be a"),
        ({"partial_rotary_factor": 0.5}, "(partial_rotary_factor 0.5) is not supported"),
        ({"rope_scaling": PARTIAL}, "(partial_rotary_factor 0.25) is not supported"),
        ({"rope_parameters": PARTIAL}, "(partial_rotary_factor 0.25) is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf, change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ModelConfig.from_hf(hf | change)


def new_form(rope):
    return {"rope_parameters": {"rope_theta": 5e5, **rope}}


def old_form(rope):
    return {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": rope}


def older_form(rope):  # before "rope_type" it was "type"
    return old_form({"type" if key == "rope_type" else key: rope[key] for key in rope})


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
forms = pytest.mark.parametrize("form", [new_form, old_form, older_form])


@forms
@pytest.mark.parametrize("rope_type", ["yarn", "linear", "dynamic", "longrope", "xyz"])
def test_other_rope_types_are_refused_by_name(hf, form, rope_type):
    message = f"RoPE type '{rope_type}' is not supported yet; supported: 'default', 'llama3'"
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(hf | form({"rope_type": rope_type, "factor": 2.0}))


@forms
def test_llama3_rope_is_read(hf, form):
    rope = ModelConfig.from_hf(hf | form(LLAMA3)).rope
    assert (rope.rope_type, rope.theta, rope.factor) == ("llama3", 5e5, 8.0)
    assert (rope.low_freq_factor, rope.high_freq_factor) == (1.0, 4.0)
    assert rope.original_max_position == 8192


@forms
@pytest.mark.parametrize("missing", sorted(set(LLAMA3) - {"rope_type"}))
def test_llama3_rope_needs_all_its_values(hf, form, missing):
    rope = {key: value for key, value in LLAMA3.items() if key != missing}
    with pytest.raises(ValueError, match=f"RoPE type 'llama3' needs {missing}$"):
        ModelConfig.from_hf(hf | form(rope))
