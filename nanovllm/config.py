"""The user's options (EngineConfig) and the checkpoint's architecture (ModelConfig), both frozen
and validated.

llm.py makes them; everything else only reads them. config.json is parsed here, so that no other
library's reading of it can change under us.
"""

import difflib
import logging
import os
from dataclasses import dataclass, fields
from typing import Any

from nanovllm.vllm_options import ALSO_FINE, SPEED_ONLY, VLLM_DEFAULTS

logger = logging.getLogger(__name__)

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
}
# On a CPU; on a GPU by our kernels; on a GPU by the flash-attn package.
ATTENTION_BACKENDS = ("TORCH_SDPA", "TRITON_ATTN", "FLASH_ATTN")


PATHS = ("tokenizer", "chat_template", "download_dir", "generation_config")
PROFILER_KEYS = {"profiler", "torch_profiler_dir"}


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of LLM; vLLM's names and meanings. None leaves a choice to us.

    Args:
        model: a checkpoint folder, or a name on the Hugging Face hub.
        tokenizer: a folder or hub name, if not the model's own.
        tokenizer_revision: the tokenizer's branch, tag or commit, if not the model's.
        chat_template: for chat, instead of the tokenizer's: a Jinja template, or a file that holds
            it.
        revision: branch, tag or commit on the hub.
        hf_token: for the hub: a token, or True for the one that is stored.
        download_dir: where the hub's files are kept; None: its own cache.
        hf_overrides: keys that replace those of config.json.
        generation_config: "auto" (the checkpoint's), a folder whose generation_config.json counts,
            or "vllm" for none.
        override_generation_config: keys that replace those of generation_config.json.
        profiler_config: {"profiler": "torch", "torch_profiler_dir": FOLDER}, for start_profile.
        dtype: "auto" (the checkpoint's; on a CPU what it computes fast), "float32", "bfloat16" or
            "float16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        max_model_len: prompt and generated tokens of a request at most; None: the checkpoint's
            limit.
        max_num_seqs: requests that run at a time.
        max_num_batched_tokens: tokens computed a step.
        block_size: tokens a page of the KV cache.
        gpu_memory_utilization: share of the GPU's memory that the engine may hold, weights and all;
            no effect on a CPU.
        kv_cache_memory_bytes: size of the KV cache in bytes; None: what gpu_memory_utilization
            leaves, on a CPU platform.default_kv_cache_bytes.
        num_gpu_blocks_override: size of the KV cache in pages, wherever it lies, instead of
            kv_cache_memory_bytes. Either way it is no more than max_num_seqs requests can use.
        enforce_eager: no CUDA graphs; no effect on a CPU.
        enable_prefix_caching: share the pages of equal prefixes.
        async_scheduling: schedule a step while one runs; None: where it helps.
        attention_backend: "auto", on a GPU "TRITON_ATTN" or "FLASH_ATTN", on a CPU "TORCH_SDPA".
        load_format: "auto" (safetensors) or "dummy" (random weights from config.json alone).
        seed: where the seeds of requests that have none come from.
        tensor_parallel_size: 1.
        skip_tokenizer_init: prompts are token ids and outputs have no text.
        trust_remote_code: False; no checkpoint's code ever runs.
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
    attention_backend: str | None = None
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
        for name in PATHS:
            if isinstance(options.get(name), os.PathLike):
                options[name] = os.fspath(options[name])
        if not isinstance(model, (str, os.PathLike)):
            raise TypeError(f"model must be a folder or a hub name, got {model!r}")
        return cls(model=os.fspath(model), **options)

    def __post_init__(self) -> None:
        required = ("device", "load_format", "generation_config")
        optional = ("revision", "tokenizer_revision", "attention_backend")
        for name in {*PATHS, *required, *optional}:
            value = getattr(self, name)
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
        if self.load_format not in ("auto", "safetensors", "dummy"):
            raise ValueError(
                f"load_format must be 'auto' (safetensors files) or 'dummy' (random weights), "
                f"got {self.load_format!r}"
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
        if self.attention_backend not in (None, "auto", *ATTENTION_BACKENDS):
            raise ValueError(
                f"attention_backend must be one of 'auto', "
                f"{', '.join(map(repr, ATTENTION_BACKENDS))}; got {self.attention_backend!r}"
            )
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} is not supported yet; use 1"
            )
        if self.trust_remote_code:
            raise ValueError(
                "trust_remote_code=True is refused: nanovllm never runs code from a checkpoint; "
                "supported architectures are built in"
            )
        if (
            None not in (self.max_num_seqs, self.max_num_batched_tokens)
            and self.max_num_batched_tokens < self.max_num_seqs  # type: ignore[operator]
        ):
            raise ValueError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_num_seqs ({self.max_num_seqs}): each running request decodes in every step"
            )


def _check_foreign_option(name: str, value: Any, known: set[str]) -> None:
    """An option we don't have: fine at vLLM's default, else an error, or a warning where it only
    tunes speed."""
    if name not in VLLM_DEFAULTS:
        close = difflib.get_close_matches(name, [*known, *VLLM_DEFAULTS], n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TypeError(f"unknown option {name!r}{hint}")
    default = VLLM_DEFAULTS[name]
    if value is None or value in (default, ALSO_FINE.get(name)):
        return
    if name not in SPEED_ONLY:
        raise ValueError(
            f"{name}={value!r} is not supported yet; leave it out (vLLM's default is {default!r})"
        )
    logger.warning("%s=%r has no effect here, and is not needed", name, value)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. The four scaling values belong to rope_type "llama3"."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """What config.json says of the architecture, under one set of names for every family."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Read the dictionary of a config.json.

        Raises:
            ValueError: a key is missing, or the checkpoint needs something that is not supported;
            names it.
        """
        try:
            return cls._parse(hf)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from error

    @classmethod
    def _parse(cls, hf: dict[str, Any]) -> "ModelConfig":
        architectures = hf.get("architectures")
        if not isinstance(architectures, list) or len(architectures) != 1:
            raise ValueError(
                f"config.json must name one architecture in 'architectures', got {architectures!r}"
            )
        _refuse_unsupported(hf)
        num_heads = _positive(hf, "num_attention_heads")
        hidden_size = _positive(hf, "hidden_size")
        num_kv_heads = _positive(hf, "num_key_value_heads", num_heads)
        head_dim = _positive(hf, "head_dim", hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads ({num_heads}) must be a multiple of "
                f"num_key_value_heads ({num_kv_heads})"
            )
        if not hf.get("head_dim") and hidden_size % num_heads:
            raise ValueError(
                f"config.json: without head_dim, hidden_size ({hidden_size}) must be a multiple of "
                f"num_attention_heads ({num_heads})"
            )
        if head_dim % 2:
            raise ValueError(f"config.json: head_dim must be even for RoPE, got {head_dim}")
        return cls(
            architecture=architectures[0],
            vocab_size=_positive(hf, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(hf, "intermediate_size"),
            num_layers=_positive(hf, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=float(hf.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            attention_bias=bool(hf.get("attention_bias", False)),
            mlp_bias=bool(hf.get("mlp_bias", False)),
            max_position_embeddings=_positive(hf, "max_position_embeddings"),
            rope=_rope_config(hf),
            dtype=hf.get("dtype") or hf.get("torch_dtype"),
            eos_token_ids=token_id_tuple(hf.get("eos_token_id")),
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of keys and values a token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def token_id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """config.json and generation_config.json write one token id or a list of them."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int for id in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(ids)


def _positive(hf: dict[str, Any], key: str, default: int | None = None) -> int:
    value = hf.get(key)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise ValueError(f"config.json: {key!r} must be a positive whole number, got {value!r}")
    return value


def _refuse_unsupported(hf: dict[str, Any]) -> None:
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantized checkpoints are not supported yet (quant_method {method!r})")
    if hf.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ValueError(f"activation {hf['hidden_act']!r} is not supported; supported: 'silu'")
    sliding = "sliding_attention" in (hf.get("layer_types") or ())
    if sliding or (hf.get("use_sliding_window") and hf.get("sliding_window")):
        raise ValueError("sliding-window attention is not supported yet (config.json asks for it)")


LLAMA3_ROPE_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *LLAMA3_ROPE_KEYS}


def _rope_config(hf: dict[str, Any]) -> RopeConfig:
    """transformers 5 writes rope_parameters; before, rope_theta stood apart from rope_scaling."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    rope = {key: value for key, value in rope.items() if value is not None}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in ("default", "llama3"):
        raise ValueError(
            f"RoPE type {rope_type!r} is not supported yet; supported: 'default', 'llama3'"
        )
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    unknown = set(rope) - ROPE_KEYS
    if unknown or hf.get("rope_interleaved"):
        raise ValueError(
            f"RoPE with {', '.join(sorted(map(str, unknown))) or 'rope_interleaved'} is not "
            f"supported (config.json)"
        )
    partial = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise ValueError(
            f"RoPE on a part of the head (partial_rotary_factor {partial}) is not supported"
        )
    if rope_type == "default":
        return RopeConfig(theta)
    missing = [name for name in LLAMA3_ROPE_KEYS if name not in rope]
    if missing:
        raise ValueError(f"config.json: RoPE type 'llama3' needs {', '.join(missing)}")
    factor, low, high, original = (rope[name] for name in LLAMA3_ROPE_KEYS)
    return RopeConfig(theta, rope_type, float(factor), float(low), float(high), int(original))
