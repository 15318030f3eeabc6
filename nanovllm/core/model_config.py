"""The checkpoint's architecture, from its config.json. It is parsed here, so that another library's
release can't change the result.

models/checkpoint.py makes a ModelConfig; models, cache and kernels read their sizes from it.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


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
    """The architecture in config.json, under one set of names for every family.

    Attributes:
        hidden_act: the activation's name.
        hf: all of config.json, for keys that only one family reads.
        max_model_len: largest number of tokens in a sequence, which the engine decides.
    """

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
    hidden_act: str
    max_position_embeddings: int
    rope: RopeConfig
    dtype: str | None
    eos_token_ids: tuple[int, ...]
    hf: dict[str, Any] = field(repr=False, compare=False)
    max_model_len: int = 0

    @property
    def hf_config(self) -> SimpleNamespace:
        """config.json with its keys as attributes, as transformers and vLLM have it."""
        return SimpleNamespace(**self.hf)

    def get_vocab_size(self) -> int:
        return self.vocab_size

    @classmethod
    def from_hf(
        cls, hf: dict[str, Any], activations: Collection[str] = ("silu", "swish")
    ) -> "ModelConfig":
        """Read the dictionary of a config.json.

        Args:
            activations: the values of `hidden_act` that the family computes.

        Raises:
            ValueError: a key is missing, or the checkpoint needs an unsupported feature; the
                message names it.
        """
        try:
            return cls._parse(hf, activations)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"config.json has a value of the wrong type: {error}") from error

    @classmethod
    def _parse(cls, hf: dict[str, Any], activations: Collection[str]) -> "ModelConfig":
        architecture = architecture_of(hf)
        _refuse_unsupported(hf, activations)
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
            architecture=architecture,
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
            hidden_act=hf.get("hidden_act") or "silu",
            max_position_embeddings=_positive(hf, "max_position_embeddings"),
            rope=_rope_config(hf),
            dtype=hf.get("dtype") or hf.get("torch_dtype"),
            eos_token_ids=token_id_tuple(hf.get("eos_token_id")),
            hf=hf,
        )

    @property
    def kv_elements_per_token(self) -> int:
        """Elements of one token's keys and values, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def architecture_of(hf: dict[str, Any]) -> str:
    """The name in `architectures`. Raises ValueError if config.json does not name exactly one."""
    architectures = hf.get("architectures")
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise ValueError(
            f"config.json must name one architecture in 'architectures', got {architectures!r}"
        )
    return str(architectures[0])


def token_id_tuple(value: int | list[int] | None) -> tuple[int, ...]:
    """Token ids from config.json or generation_config.json: one id or a list of ids."""
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


def _refuse_unsupported(hf: dict[str, Any], activations: Collection[str]) -> None:
    if hf.get("quantization_config"):
        method = hf["quantization_config"].get("quant_method", "unknown")
        raise ValueError(f"quantized checkpoints are not supported yet (quant_method {method!r})")
    if hf.get("hidden_act", "silu") not in activations:
        supported = ", ".join(map(repr, activations))
        raise ValueError(
            f"activation {hf['hidden_act']!r} is not supported; supported: {supported}"
        )
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
    """RoPE from rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
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
