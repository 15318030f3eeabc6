"""A checkpoint's files around the weights: where they are, config.json, generation_config.json, the
tokenizer.

llm.py calls it at construction; weights are models/weights.py's business.
"""

import json
from pathlib import Path
from typing import Any

WEIGHT_FILES = ("*.safetensors", "model.safetensors.index.json")
SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_folder(
    model: str, revision: str | None, with_weights: bool, option: str = "model"
) -> Path:
    """The local folder of a checkpoint: `model` itself, or the hub's snapshot of that name,
    downloaded if needed.

    Raises:
        ValueError: no such folder, nor a model of that name on the hub.
    """
    folder = Path(model).expanduser()
    if model and folder.is_dir():
        return folder
    if not model or folder.exists():
        raise ValueError(
            f"{option} {model!r} is not a folder; give a checkpoint's folder or a hub name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*SMALL_FILES, *WEIGHT_FILES] if with_weights else list(SMALL_FILES)
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise ValueError(f"{option} {model!r} is neither a folder nor a name on the hub") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"{option} {model!r} is no folder here, and the hub did not deliver it: "
            f"{str(error).splitlines()[0]}"
        ) from error


def read_json(folder: Path, name: str, *, required: bool) -> dict[str, Any]:
    """A JSON object of the checkpoint; {} if it may be missing and is. Raises ValueError for a
    missing or broken one."""
    file = folder / name
    if not file.exists() and not required:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} has no {name}: it is not a checkpoint folder") from None
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def load_tokenizer(folder: Path) -> Any:
    """The checkpoint's tokenizer. Raises ValueError if there is none."""
    from transformers import AutoTokenizer

    # Without any of these transformers makes up an empty tokenizer from config.json.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}); give tokenizer=FOLDER, or "
            f"skip_tokenizer_init=True for prompts of token ids"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
        raise ValueError(
            f"{folder} has a tokenizer that does not load ({error}); give tokenizer=FOLDER, or "
            f"skip_tokenizer_init=True for prompts of token ids"
        ) from error
