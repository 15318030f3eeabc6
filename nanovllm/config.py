"""The user's options, frozen and validated. llm.py makes an EngineConfig; other modules read it."""

import difflib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

# vLLM 0.26's options and methods without an implementation here: options with vLLM's defaults (in a
# table of their own if they only tune speed), for some a list of other values with the same effect,
# and methods. tools/vllm_defaults.py reads the defaults from vLLM.
_VLLM = json.loads((Path(__file__).parent / "core" / "vllm_options.json").read_text())
SPEED_ONLY = frozenset(_VLLM["speed_only"])
VLLM_DEFAULTS: dict[str, Any] = _VLLM["speed_only"] | _VLLM["supported_at_default"]
ALSO_FINE: dict[str, list[Any]] = _VLLM["also_fine"]
UNSUPPORTED_METHODS: dict[str, str] = _VLLM["unsupported_methods"]
INSTEAD = {
    "logits_processors": (
        "leave it out: a request has its own, SamplingParams(logits_processors=[f]); a function "
        "f(output_token_ids, logits) returns logits, and holds what vLLM's classes read of "
        "extra_args"
    ),
    "served_model_name": "leave it out: run-batch has it as --served-model-name",
}

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
# On a CPU torch's attention; on a GPU our kernels, or the flash-attn package.
ATTENTION_BACKENDS = ("TORCH_SDPA", "TRITON_ATTN", "FLASH_ATTN")
PATHS = ("tokenizer", "chat_template", "download_dir", "generation_config")


@dataclass
class ProfilerConfig:
    """Where LLM.start_profile writes: vLLM's class, with the two of its fields that count here.

    Args:
        profiler: "torch", or None for no profiles.
        torch_profiler_dir: the folder.
    """

    profiler: str | None = None
    torch_profiler_dir: str | os.PathLike = ""


PROFILER_KEYS = {f.name for f in fields(ProfilerConfig)}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of LLM; vLLM's names and meanings. None: nanovllm decides.

    Args:
        model: a checkpoint folder, or a name on the Hugging Face hub.
        tokenizer: a folder or hub name, if not the model's own.
        tokenizer_revision: the tokenizer's branch, tag or commit, if not the model's.
        chat_template: a Jinja template, or a file with one, instead of the tokenizer's.
        revision: branch, tag or commit on the hub.
        hf_token: a token of the hub, or True for the stored one.
        download_dir: the folder for files from the hub; None: the hub's own cache.
        hf_overrides: keys that replace keys of config.json.
        generation_config: "auto" (the checkpoint's), a folder whose generation_config.json counts,
            or "vllm" for none.
        override_generation_config: keys that replace keys of generation_config.json.
        profiler_config: a ProfilerConfig, or {"profiler": "torch", "torch_profiler_dir": FOLDER},
            for start_profile.
        dtype: "auto" (the checkpoint's; on a CPU what it computes fast), "float32", "bfloat16" or
            "float16".
        device: "auto" (a GPU if the machine has one), "cpu", "cuda" or "cuda:N".
        max_model_len: largest number of prompt and output tokens of a sequence; None, -1 or
            "auto": the checkpoint's limit, lowered with a warning to what the KV cache holds.
        max_num_seqs: largest number of requests that run at a time.
        max_num_batched_tokens: the token budget of a step.
        block_size: tokens in a block of the KV cache.
        gpu_memory_utilization: share of the GPU's memory that the engine may hold, weights
            included; no effect on a CPU.
        kv_cache_memory_bytes: size of the KV cache in bytes; None: what gpu_memory_utilization
            leaves, on a CPU platform.default_kv_cache_bytes.
        num_gpu_blocks_override: size of the KV cache in blocks, on any device, instead of
            kv_cache_memory_bytes. Both are reduced to what max_num_seqs sequences can use.
        enforce_eager: no CUDA graphs; no effect on a CPU.
        enable_prefix_caching: share the blocks of equal prefixes.
        async_scheduling: schedule the next step while one runs; None: on a GPU.
        scheduling_policy: "fcfs" (first come, first served) or "priority" (the lowest `priority` of
            generate and add_request first).
        attention_backend: "auto", on a GPU "TRITON_ATTN" or "FLASH_ATTN", on a CPU "TORCH_SDPA"; or
            a callable that makes a backend from ops.make_attention's other arguments.
        load_format: "auto", "safetensors" or "hf" (safetensors files), or "dummy" (random weights
            from config.json alone).
        seed: seeds of requests without a seed of their own are made from it.
        tensor_parallel_size: 1.
        skip_tokenizer_init: prompts are token ids and outputs have no text.
        trust_remote_code: no effect: code from a checkpoint never runs.
    """

    model: str
    tokenizer: str | None = None
    tokenizer_revision: str | None = None
    chat_template: str | None = None
    revision: str | None = None
    hf_token: bool | str | None = None
    download_dir: str | None = None
    hf_overrides: dict[str, Any] | None = None
    generation_config: str = "auto"
    override_generation_config: dict[str, Any] | None = None
    profiler_config: dict[str, Any] | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    num_gpu_blocks_override: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    async_scheduling: bool | None = None
    scheduling_policy: str = "fcfs"
    attention_backend: str | Callable | None = None
    load_format: str = "auto"
    seed: int = 0
    tensor_parallel_size: int = 1
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False

    @classmethod
    def from_options(cls, model: str, **options: Any) -> "EngineConfig":
        """Check and normalise LLM's keyword arguments.

        Raises:
            ValueError: a value is out of range or not supported.
            TypeError: an option is unknown or its value has the wrong type.
        """
        known = {f.name for f in fields(cls)}
        for name in [name for name in options if name not in known]:
            _check_foreign_option(name, options.pop(name), known)
        if "dtype" in options:  # a torch.dtype prints as "torch.float32"
            options["dtype"] = str(options["dtype"]).removeprefix("torch.")
        if options.get("max_model_len") in (-1, "auto"):
            options["max_model_len"] = None
        if isinstance(options.get("attention_backend"), Enum):
            options["attention_backend"] = plain(options["attention_backend"])
        if options.get("profiler_config") is not None:
            config, default = plain(options["profiler_config"]), _VLLM["config_objects"]
            if isinstance(config, dict):
                config = beyond(config, default["profiler_config"])
            options["profiler_config"] = config
        for name in PATHS:
            if isinstance(options.get(name), os.PathLike):
                options[name] = os.fspath(options[name])
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model must be a folder or a hub name, got {model!r}")
        return cls(model=os.fspath(model), **options)

    def __post_init__(self) -> None:
        required = ("device", "load_format", "generation_config", "scheduling_policy")
        optional = ("revision", "tokenizer_revision", "attention_backend")
        for name in {*PATHS, *required, *optional}:
            value = getattr(self, name)
            if name == "attention_backend" and callable(value):
                continue
            if not isinstance(value, str) and (value is not None or name in required):
                raise TypeError(f"{name} must be a string, got {value!r}")
        for name in ("hf_overrides", "override_generation_config", "profiler_config"):
            value = getattr(self, name)
            if not isinstance(value, dict | None):
                raise TypeError(f"{name} must be a dict, got {value!r:.80}")
        if not isinstance(self.hf_token, bool | str | None):
            raise TypeError("hf_token must be a string, True or False")
        for name in (
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "block_size",
            "kv_cache_memory_bytes",
            "num_gpu_blocks_override",
            "tensor_parallel_size",
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        for name in (
            "enforce_eager",
            "enable_prefix_caching",
            "async_scheduling",
            "skip_tokenizer_init",
            "trust_remote_code",
        ):
            value = getattr(self, name)
            if value is not None and type(value) is not bool:
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if type(self.seed) is not int or not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {self.seed!r}")
        self._check_supported()

    def _check_supported(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        object.__setattr__(self, "dtype", DTYPES[self.dtype])
        share = self.gpu_memory_utilization
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"gpu_memory_utilization must be a number in (0, 1], got {share!r}")
        if self.load_format not in ("auto", "safetensors", "hf", "dummy"):
            raise ValueError(
                f"load_format must be 'auto', 'safetensors' or 'hf' (safetensors files), or "
                f"'dummy' (random weights); got {self.load_format!r}"
            )
        profiler = self.profiler_config or {}
        folder = profiler.get("torch_profiler_dir", "")
        if (
            not profiler.keys() <= PROFILER_KEYS
            or profiler.get("profiler", "torch") != "torch"
            or not isinstance(folder, str | os.PathLike)
        ):
            raise ValueError(
                "profiler_config must be {'profiler': 'torch', 'torch_profiler_dir': FOLDER}, "
                f"got {profiler!r:.80}"
            )
        backend = self.attention_backend
        if not (callable(backend) or backend in (None, "auto", *ATTENTION_BACKENDS)):
            raise ValueError(
                f"attention_backend must be one of 'auto', "
                f"{', '.join(map(repr, ATTENTION_BACKENDS))}, or a callable; got {backend!r}"
            )
        if self.scheduling_policy not in ("fcfs", "priority"):
            raise ValueError(
                f"scheduling_policy must be 'fcfs' or 'priority', got {self.scheduling_policy!r}"
            )
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} is not supported yet; use 1"
            )
        if (
            None not in (self.max_num_seqs, self.max_num_batched_tokens)
            and self.max_num_batched_tokens < self.max_num_seqs  # type: ignore[operator]
        ):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request decodes in every step"
            )


def options_of(engine_args: Any, stat_loggers: list[Any] | None = None) -> dict[str, Any]:
    """The options that an object holds as attributes: an EngineArgs, ours or vLLM's, or another.
    Raises ValueError for stat_loggers, which vLLM's from_engine_args takes beside it."""
    if stat_loggers:
        raise ValueError("stat_loggers are not supported: get_metrics() gives the counts")
    return {name: v for name, v in vars(engine_args).items() if not name.startswith("_")}


def _check_foreign_option(name: str, value: Any, known: set[str]) -> None:
    """Check an option of vLLM's without an implementation here: accepted at vLLM's default, else an
    error, or a warning if it only tunes speed."""
    if name not in VLLM_DEFAULTS:
        close = difflib.get_close_matches(name, [*known, *VLLM_DEFAULTS], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"unknown option {name!r}{hint}")
    value, default = plain(value), VLLM_DEFAULTS[name]
    for other in ALSO_FINE.get(name, []):
        if asks_for_nothing(value, default | other if isinstance(other, dict) else other):
            return
    if asks_for_nothing(value, default):
        return
    value = beyond(value, default)
    if name not in SPEED_ONLY:
        if isinstance(value, dict) and isinstance(default, dict):
            default = {key: default[key] for key in value.keys() & default.keys()}
        instead = INSTEAD.get(name, f"leave it out (vLLM's default is {default!r})")
        raise ValueError(f"{name}={value!r} is not supported yet; {instead}")
    logger.warning("%s=%r has no effect here, and is not needed", name, value)


def plain(value: Any) -> Any:
    """A value as JSON has it: an EngineArgs object of vLLM's own also holds config objects, enums
    and sets."""
    if isinstance(value, Enum):
        return value.value if isinstance(value, str | int) else value.name
    if isinstance(value, set | frozenset | tuple | list):
        return [plain(element) for element in value]
    if hasattr(value, "__dict__") and not (callable(value) or isinstance(value, str)):
        value = vars(value)
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items() if not str(k).startswith("_")}
    return value


def asks_for_nothing(value: Any, default: Any) -> bool:
    """Whether a plain value is vLLM's default, None or empty; a dict: each of its entries."""
    if isinstance(value, dict):
        return not beyond(value, default)
    return value is None or value == default or value in ([], "")


def beyond(value: Any, default: Any) -> Any:
    """What a plain value asks for beyond vLLM's default: of a dict the entries that differ."""
    if not isinstance(value, dict):
        return value
    known = default if isinstance(default, dict) else {}
    return {
        k: beyond(v, known.get(k))
        for k, v in value.items()
        if not (k in known and asks_for_nothing(v, known[k]))
    }
