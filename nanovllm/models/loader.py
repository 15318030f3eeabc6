"""From a checkpoint folder to a model on its device: strict, packed, without a second copy.

The worker calls it. Which tensors belong together is the model's own table (`packed`).
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm import ops
from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.models import model_class
from nanovllm.models.frame import CausalLM

GPU_LOADERS = 8  # threads that copy weights to a GPU
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Uniform in +-0.035 has the standard deviation 0.02 that models start from.
DUMMY_WEIGHT_BOUND = 0.035


def build_model(config: ModelConfig, max_positions: int, dtype: torch.dtype) -> CausalLM:
    """The model with parameters that have shapes but no memory yet."""
    with torch.device("meta"):
        model = model_class(config.architecture)(config, max_positions)
    for param in model.parameters():  # not the buffers: RoPE's table stays in float32
        param.data = param.data.to(dtype)
    return model.requires_grad_(False).eval()


def weight_bytes(model: CausalLM, device: torch.device) -> int:
    """Bytes of the parameters on the device, a tied one counted once, unless the head is packed."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    head = model.lm_head.weight
    if model.is_tied and ops.packs_weights(device, head.dtype):
        size += head.numel() * head.element_size()
    return size


def pack_weights(model: CausalLM) -> None:
    """Put the weights of matrix products in the order that their device reads fastest."""
    for module in model.modules():
        if isinstance(module, Linear):
            packed = ops.pack_weight(module.weight)
            module.weight = nn.Parameter(packed, requires_grad=False)


def allocate(model: CausalLM, device: torch.device) -> None:
    """Give a built model memory on `device`; its weights are anything."""
    on_device: dict[nn.Parameter, nn.Parameter] = {}  # a tied parameter stays one
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param not in on_device:
                data = torch.empty(param.shape, dtype=param.dtype, device=device)
                on_device[param] = nn.Parameter(data, requires_grad=False)
            setattr(module, name, on_device[param])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, buffer.to(device))


def load_weights(model: CausalLM, folder: Path) -> None:
    """Fill an allocated model from the folder's safetensors files.

    Raises:
        ValueError: a file or tensor is missing, surplus, misshapen or broken; names it.
    """
    _fill(model, _checkpoint_files(folder))


def fill_dummy_weights(model: CausalLM, seed: int) -> None:
    """Give an allocated model random weights, for benchmarks."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(seed)
    for param in model.parameters():
        if param.dim() == 1:  # norms; biases as well, where any value will do
            param.fill_(1.0)
        else:
            param.uniform_(-DUMMY_WEIGHT_BOUND, DUMMY_WEIGHT_BOUND, generator=generator)


def _checkpoint_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [folder / name for name in names]
            if not files:
                raise ValueError("it names no shards")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index} is not a valid index of shards: {error!r}") from None
        missing = [file.name for file in files if not file.exists()]
        if missing:
            raise ValueError(
                f"{folder}: shards named in {index.name} are missing: {', '.join(missing)}; "
                f"fetch the checkpoint again"
            )
        return files
    single = folder / "model.safetensors"  # others beside it are another format's copy
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors file (other weight formats are not read; "
            f"load_format='dummy' draws random weights)"
        )
    return files


def _fill(model: CausalLM, files: list[Path]) -> None:
    targets = _targets(model)
    tied_head = None  # a tied head may be in the checkpoint too, as a copy of the embedding
    # Reading and copying wait for the disk and the bus; a CPU's copies have threads of their own.
    num_threads = GPU_LOADERS if model.lm_head.weight.is_cuda else 1
    for file in files:
        try:
            # The pool is left first: no thread reads a file that is closed.
            with safe_open(file, "pt") as tensors, ThreadPoolExecutor(num_threads) as pool:
                copies = []
                for name in tensors.keys():  # noqa: SIM118 (a safe_open is not iterable)
                    if name in targets:
                        copies.append(pool.submit(_copy, targets.pop(name), tensors, name, file))
                    elif model.is_tied and name == "lm_head.weight":
                        tied_head = tensors.get_tensor(name).to(model.lm_head.weight)
                    elif not name.endswith(model.ignored):
                        raise ValueError(
                            f"{file}: {name} has no place in {type(model).__name__} "
                            f"(surplus, or there twice)"
                        )
                for copy in copies:
                    copy.result()
        except SafetensorError as error:
            raise ValueError(
                f"{file} is truncated or not a safetensors file ({error}); fetch it again"
            ) from None
    if targets:
        some = ", ".join(list(targets)[:5]) + (", ..." if len(targets) > 5 else "")
        raise ValueError(
            f"{files[0].parent} lacks {len(targets)} weights that config.json asks for: {some}"
        )
    if tied_head is not None and not torch.equal(tied_head, model.lm_head.weight):
        raise ValueError(
            f"{files[0].parent}: lm_head.weight differs from the embedding, but config.json says "
            f"tie_word_embeddings"
        )


def _targets(model: CausalLM) -> dict[str, torch.Tensor]:
    """Where each tensor of the checkpoint goes: a parameter, or rows of a packed one."""
    targets = {}
    for name, param in model.named_parameters():
        path, _, kind = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        if leaf in model.packed:
            sizes = model.get_submodule(path).sizes
            for part, rows in zip(model.packed[leaf], param.split(sizes), strict=True):
                targets[f"{parent}.{part}.{kind}"] = rows
        else:
            targets[name] = param
    return targets


def _copy(target: torch.Tensor, tensors: safe_open, name: str, file: Path) -> None:
    tensor = tensors.get_tensor(name)
    if target.shape != tensor.shape:
        raise ValueError(
            f"{file}: {name} has shape {list(tensor.shape)}, config.json says {list(target.shape)}"
        )
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{file}: {name} is in {tensor.dtype}: quantized weights are not supported yet"
        )
    target.copy_(tensor)
