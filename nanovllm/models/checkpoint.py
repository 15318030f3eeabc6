"""A checkpoint's files other than the weights: its folder, config.json, generation_config.json, the
tokenizer. llm.py calls it at construction; models/loader.py reads the weights.
"""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nanovllm.config import EngineConfig
from nanovllm.core.model_config import ModelConfig, architecture_of, token_id_tuple
from nanovllm.models import model_class
from nanovllm.sampling_params import SamplingParams

WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
JSON_BYTES = 16 << 20  # largest config.json or generation_config.json
JSON_DEPTH = 64  # objects and lists inside each other, far from where Python's recursion ends
_RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.*.json", "*.model", "vocab.json", "vocab.txt")
SENTENCEPIECE = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # its packages


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint without its weights. `tokenizer` is None with skip_tokenizer_init."""

    model_config: ModelConfig
    generation_config: dict[str, Any]
    tokenizer: Any
    eos_token_ids: tuple[int, ...]

    @property
    def recommends_limits(self) -> bool:
        """Whether generation_config limits draws by top_k, top_p or min_p."""
        params = self.default_sampling_params
        return params.top_k > 0 or params.top_p < 1 or params.min_p > 0

    @cached_property
    def default_sampling_params(self) -> SamplingParams:
        """The sampling parameters that generation_config recommends.

        Raises:
            ValueError: a value is out of range.
        """
        names = {name: name for name in _RECOMMENDED} | {"max_new_tokens": "max_tokens"}
        found = {name: self.generation_config.get(key) for key, name in names.items()}
        try:
            return SamplingParams(**{name: x for name, x in found.items() if x is not None})
        except (ValueError, TypeError) as error:
            raise ValueError(f"generation_config.json: {error}") from None


def read_checkpoint(config: EngineConfig) -> Checkpoint:
    """Read the checkpoint that the options name.

    Raises:
        ValueError: as the functions below.
    """
    folder = resolve_folder(config)
    hf_config = read_json(folder, "config.json", required=True) | (config.hf_overrides or {})
    model_config = model_class(architecture_of(hf_config)).read_config(hf_config)
    generation_config = _read_generation_config(config, folder)
    tokenizer = None
    if not config.skip_tokenizer_init:
        if config.tokenizer is not None or config.tokenizer_revision is not None:
            folder = resolve_folder(config, option="tokenizer")
        tokenizer = load_tokenizer(folder)
    eos_token_ids = _eos_token_ids(model_config, generation_config, tokenizer)
    return Checkpoint(model_config, generation_config, tokenizer, eos_token_ids)


def _read_generation_config(config: EngineConfig, folder: Path) -> dict[str, Any]:
    """The generation_config that the options name; {} for vLLM's defaults."""
    found: dict[str, Any] = {}
    if config.generation_config == "auto":
        found = read_json(folder, "generation_config.json", required=False)
    elif config.generation_config != "vllm":
        given = resolve_folder(config, option="generation_config")
        found = read_json(given, "generation_config.json", required=True)
    return found | (config.override_generation_config or {})


def _eos_token_ids(
    model_config: ModelConfig, generation_config: dict[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    """The tokenizer's EOS first, then generation_config's tokens or, if it has none,
    config.json's."""
    eos = token_id_tuple(generation_config.get("eos_token_id")) or model_config.eos_token_ids
    own = getattr(tokenizer, "eos_token_id", None)
    eos = eos if own is None else (own, *eos)
    # A token outside the vocabulary is never sampled.
    return tuple(id for id in dict.fromkeys(eos) if 0 <= id < model_config.vocab_size)


def resolve_folder(
    config: EngineConfig, *, with_weights: bool = False, option: str = "model"
) -> Path:
    """The local folder of a checkpoint: the folder that the option names, or the hub's snapshot of
    that name, downloaded if needed.

    Raises:
        ValueError: neither a folder nor a model on the hub has that name.
    """
    model, revision = getattr(config, option), config.revision
    if option == "tokenizer":
        model, revision = model or config.model, config.tokenizer_revision
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        _check_files(folder)
        return folder
    if not model or folder.exists():
        raise ValueError(
            f"{option} {model!r} is not a folder; give a checkpoint's folder or a hub name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*SMALL_FILES, *WEIGHT_FILES] if with_weights else list(SMALL_FILES)
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                token=config.hf_token,
                cache_dir=config.download_dir,
            )
        )
    except HFValidationError:
        raise ValueError(f"{option} {model!r} is neither a folder nor a name on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option} {model!r} is no folder here, and the hub did not deliver it: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _check_files(folder: Path) -> None:
    """Refuse a folder, pipe or device in the place of a file: to read a pipe or device may never
    end. A link to nothing would be read as if the file were not part of the checkpoint."""
    for pattern in (*SMALL_FILES, *WEIGHT_FILES):
        for file in folder.glob(pattern):
            if not os.path.isfile(file):  # False, too, for a link to itself
                is_dangling = file.is_symlink() and not os.path.exists(file)
                what = "a link to nothing" if is_dangling else "no regular file"
                raise ValueError(f"{file} is {what}; fetch the checkpoint again")


def read_json(
    folder: Path, name: str, *, required: bool, max_bytes: int = JSON_BYTES
) -> dict[str, Any]:
    """A JSON file of the checkpoint; {} if it is not required and missing.

    Raises:
        ValueError: the file is required and missing, or too large or deep, or broken.
    """
    file = folder / name
    if not file.exists() and not required:
        return {}
    try:
        if (size := file.stat().st_size) > max_bytes:
            raise ValueError(f"it has {size} bytes, more than {max_bytes}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}: it is not a checkpoint folder") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    except OSError as error:
        raise ValueError(f"{file} can't be read: {error.strerror}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    if deep := [key for key, value in content.items() if _is_deeper(value, JSON_DEPTH)]:
        raise ValueError(f"{file}: {deep[0]!r:.80} nests more than {JSON_DEPTH} levels deep")
    return content


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return depth == 0 or any(_is_deeper(one, depth - 1) for one in inner)


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer.

    Raises:
        ValueError: the folder has none, or it does not load.
    """
    from transformers import AutoTokenizer

    # Without any of these files transformers makes an empty tokenizer from config.json.
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); give tokenizer=FOLDER, or "
            f"skip_tokenizer_init=True for prompts of token ids"
        )
    _check_sentencepiece(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for a missing or broken tokenizer
        raise ValueError(
            f"{folder} has a tokenizer that does not load ({error}); give tokenizer=FOLDER, or "
            f"skip_tokenizer_init=True for prompts of token ids"
        ) from error


def _check_sentencepiece(folder: Path) -> None:
    """A tokenizer in sentencepiece's format alone needs packages; without them transformers takes
    its file for another format, and asks for that one's."""
    others = [pattern for pattern in TOKENIZER_FILES if pattern != "*.model"]
    if any(any(folder.glob(pattern)) for pattern in others):
        return
    missing = [package for name, package in SENTENCEPIECE.items() if not _is_installed(name)]
    for file in folder.glob("*.model"):
        with file.open("rb") as content:
            is_sentencepiece = content.read(1) == b"\n"  # protobuf's mark of its first piece
        if missing and is_sentencepiece:
            raise ValueError(
                f"{folder} has its tokenizer in sentencepiece's format alone ({file.name}), which "
                f"needs packages that are not installed: pip install {' '.join(missing)}"
            )


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False
