"""From a checkpoint folder to a model on its device: strict, and without a second copy.

The worker calls it. The model itself says where each tensor goes (`sources`), the weight formats
how it lies in memory.
"""

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from nanovllm.core.model_config import ModelConfig
from nanovllm.layers.linear import Linear
from nanovllm.models import model_class
from nanovllm.models.checkpoint import read_json
from nanovllm.models.frame import CausalLM
from nanovllm.quantization.weight_format import packs_weights

logger = logging.getLogger(__name__)

INDEX_BYTES = 256 << 20  # largest index of shards
GPU_LOADERS = 8  # threads that copy weights to a GPU
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Uniform in +-0.035 has the standard deviation 0.02 that models start from.
DUMMY_WEIGHT_BOUND = 0.035


class WeightError(ValueError):
    """A checkpoint does not fit the model."""


def build_model(config: ModelConfig, max_positions: int, dtype: torch.dtype) -> CausalLM:
    """The model with parameters that have shapes but no memory yet."""
    with torch.device("meta"):
        model = model_class(config.architecture)(config, max_positions)
        for param in model.parameters():  # not the buffers: RoPE's table stays in float32
            param.data = param.data.to(dtype)
        for name, weight_format in model.formats.items():
            linear = model.get_submodule(name)
            assert isinstance(linear, Linear)
            linear.use(weight_format)  # its tensors have dtypes of their own
    return model.requires_grad_(False).eval()


def weight_bytes(model: CausalLM, device: torch.device) -> int:
    """Bytes of the parameters on the device; a tied one counts once, unless the head is packed."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if model.is_tied and packs_weights(device, model.lm_head.weight.dtype):
        size += model.lm_head.weight.numel() * model.lm_head.weight.element_size()
    return size


def prepare_weights(model: CausalLM) -> None:
    """Bring loaded weights into the format that their device multiplies fastest."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.format = module.format.prepare(module)


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


def load_checkpoint(model: CausalLM, folder: Path) -> None:
    """Fill an allocated model from the folder's safetensors files.

    Raises:
        ValueError: a file or tensor is missing, surplus, misshapen or broken; names it.
    """
    files = _checkpoint_files(folder)
    place = folder  # of what is loaded now

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal place
        for place in files:
            try:
                with safe_open(place, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 (a safe_open is not iterable)
                        yield name, file.get_tensor(name)  # a view, read when it is copied
            except SafetensorError as error:
                raise ValueError(
                    f"{place} is truncated or not a safetensors file ({error}); fetch it again"
                ) from None
            except OSError as error:
                raise ValueError(f"{place} can't be read: {error}") from None
        place = folder

    try:
        load_weights(model, tensors())
    except WeightError as error:
        raise ValueError(f"{place}: {error}") from None


def load_weights(model: CausalLM, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Fill an allocated model, once or again, but before `prepare_weights`: on a CPU that leaves
    nothing to fill.

    Args:
        tensors: names in the checkpoint and tensors, on any device; all that `model.sources()`
            names, each once. If the head is tied, one of embedding and head is enough.

    Raises:
        WeightError: a tensor is missing, surplus or misshapen; names it.
    """
    targets = model.sources()
    tied_head = None  # a tied head may be in the checkpoint too, as a copy of the embedding
    embedding = next((name for name, to in targets.items() if to is model.lm_head.weight), "")
    # Reading and copying wait for the disk and the bus; a CPU's copies have threads of their own.
    num_threads = GPU_LOADERS if next(model.parameters()).is_cuda else 1
    copies: deque[Future[torch.Tensor]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for name, tensor in tensors:
            if name in targets:
                target = targets.pop(name)
                _check_fit(name, tensor, target)
                copies.append(pool.submit(target.copy_, tensor))
            elif model.is_tied and name == "lm_head.weight":
                _check_fit(name, tensor, model.lm_head.weight)
                tied_head = tensor.to(model.lm_head.weight)
            elif not name.endswith(model.ignored):
                raise WeightError(
                    f"{name} has no place in {type(model).__name__} (surplus, or there twice)"
                )
            if len(copies) > 4 * num_threads:  # the tensors that wait take memory
                copies.popleft().result()
        for copy in copies:
            copy.result()
    if tied_head is not None and embedding in targets:
        targets.pop(embedding).copy_(tied_head)
    if targets:
        raise WeightError(
            f"the checkpoint lacks {len(targets)} weights that config.json asks for: "
            f"{some_of(list(targets))}"
        )
    if tied_head is not None and not _are_equal(tied_head, model.lm_head.weight):
        raise WeightError(
            "lm_head.weight differs from the embedding, but config.json says tie_word_embeddings"
        )
    _warn_of_broken(model)


def _check_fit(name: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
    """Raise WeightError for a tensor that does not fill its target."""
    if target.shape != tensor.shape:
        raise WeightError(
            f"{name} has shape {list(tensor.shape)}, config.json says {list(target.shape)}"
        )
    may_convert = tensor.dtype in WEIGHT_DTYPES and target.dtype in WEIGHT_DTYPES
    if tensor.dtype != target.dtype and not may_convert:
        raise WeightError(
            f"{name} is in {tensor.dtype}: quantized weights are not supported yet "
            f"(this model's are in {target.dtype})"
        )


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Also where both are NaN; that is looked at only if they would differ: it takes memory."""
    return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)


def _warn_of_broken(model: CausalLM) -> None:
    """Warn if weights are NaN or infinite: the model runs, and its texts are nonsense."""
    weights = {n: w for n, w in model.sources().items() if w.dtype in WEIGHT_DTYPES and w.numel()}
    if not weights:
        return
    # The extremes of a tensor with a NaN are NaN.
    extremes = [torch.stack(weight.aminmax()).double() for weight in weights.values()]
    is_good = torch.stack(extremes).isfinite().all(1).tolist()
    if broken := [name for name, good in zip(weights, is_good, strict=True) if not good]:
        logger.warning(
            "%d weights have NaN or infinite values, and texts will be nonsense: %s",
            len(broken),
            some_of(broken),
        )


def some_of(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def fill_dummy_weights(model: CausalLM, seed: int) -> None:
    """Give an allocated model random weights, for benchmarks."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for param in model.parameters():
        if not param.is_floating_point():  # of a weight format
            param.random_(generator=generator)
        elif param.dim() == 1:  # norms; biases as well, where any value will do
            param.fill_(1.0)
        else:
            param.uniform_(-DUMMY_WEIGHT_BOUND, DUMMY_WEIGHT_BOUND, generator=generator)


def _checkpoint_files(folder: Path) -> list[Path]:
    """The files with weights: as in transformers a whole one counts more than an index, which may
    be left from older shards."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    files = _shards(index) if index.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{folder} has no *.safetensors file (other weight formats are not read; "
            f"load_format='dummy' draws random weights)"
        )
    return files


def _shards(index: Path) -> list[Path]:
    """The files that an index names."""
    folder = index.parent
    try:
        content = read_json(folder, index.name, required=True, max_bytes=INDEX_BYTES)
        names = sorted(set(content["weight_map"].values()))
        files = [folder / name for name in names]
        if not files:
            raise ValueError("it names no shards")
        paths = [Path(name) for name in names]
        if outside := [str(path) for path in paths if path.is_absolute() or ".." in path.parts]:
            raise ValueError(f"it names files outside of the folder: {some_of(outside)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not a valid index of shards: {error!r}") from None
    # os.path's is False too for a name that no file can have.
    if missing := [name for name in names if not os.path.isfile(folder / name)]:
        raise ValueError(
            f"{folder}: shards named in {index.name} are missing: {some_of(missing)}; "
            f"fetch the checkpoint again"
        )
    return files
