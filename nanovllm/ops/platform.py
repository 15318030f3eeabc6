"""Device facilities: which devices can be used, their fast dtypes, their memory, their streams.

llm.py and the worker call it; ops/__init__.py chooses kernels.
"""

import gc
import importlib.util
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

# Weights and the KV cache in huge pages of 2 MiB, on Linux: fewer page faults, longer prefetches.
# torch reads the variable at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

logger = logging.getLogger(__name__)

GIB = 2**30
CPU_MAX_NUM_SEQS = 256
CPU_MAX_NUM_BATCHED_TOKENS = 1024  # activations of more tokens outgrow the CPU's caches
CPU_KV_CACHE_BYTES = 4 * GIB
MIN_CAPABILITY = (8, 0)
LARGE_GPU_BYTES = 70 * GIB


def resolve_device(name: str) -> torch.device:
    """The device that an option names; "auto" is a GPU if the machine has a suitable one.

    Raises:
        ValueError: the device can't be used.
    """
    if name == "cpu":
        return torch.device("cpu")
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", torch.cuda.current_device())
        obstacle = _gpu_obstacle(device)
        if obstacle is None:
            return device
        logger.warning("the GPU is left alone: %s", obstacle)
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type != "cuda":
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError(
            f"device={name!r}, but this PyTorch sees no GPU (torch {torch.__version__}); install a "
            f"build with CUDA and check nvidia-smi, or leave device out"
        )
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but there are {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", index)
    obstacle = _gpu_obstacle(device)
    if obstacle is not None:
        raise ValueError(f"device={name!r} won't do: {obstacle}; device='cpu' runs everywhere")
    return device


def _gpu_obstacle(device: torch.device) -> str | None:
    """Why our kernels can't run on a GPU; None: they can."""
    if torch.version.hip is not None:
        return "AMD's GPUs are not supported"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}, and the kernels need 8.0 (Ampere) or newer"
        )
    if importlib.util.find_spec("triton") is None:
        return "the triton package is missing (pip install triton)"
    return None


def resolve_dtype(name: str, checkpoint_dtype: str | None, device: torch.device) -> torch.dtype:
    """The dtype to compute in. "auto" is the checkpoint's dtype; a CPU computes half precision as
    bfloat16 if it multiplies bfloat16 in hardware, else as float32, which is several times
    faster there."""
    if name != "auto":
        return getattr(torch, name)
    if checkpoint_dtype not in ("bfloat16", "float16"):
        return torch.float32
    if device.type == "cuda":
        return getattr(torch, checkpoint_dtype)
    dtype = torch.bfloat16 if cpu_has_bf16_products() else torch.float32
    if str(dtype) != f"torch.{checkpoint_dtype}":
        logger.info(
            "dtype 'auto': %s is %s on this CPU, where it is faster", checkpoint_dtype, dtype
        )
    return dtype


def cpu_has_bf16_products() -> bool:
    """Whether the CPU has bfloat16 dot products or matrix tiles (AVX-512 BF16, AMX, Arm BF16)."""
    flags = _cpu_flags()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})


def _cpu_flags() -> set[str]:
    """Linux's names of the CPU's features; empty on other systems, which only costs speed."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {
        flag
        for line in lines
        if line.lower().startswith(("flags", "features"))
        for flag in line.partition(":")[2].split()
    }


def available_memory() -> int | None:
    """Bytes that new allocations on the CPU may take, or None if the system doesn't tell."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    limits.extend(_container_memory())
    return min(limits, default=None)


def _container_memory() -> list[int]:
    """Bytes that a container's limit (cgroup 2) leaves; page cache that it can drop is free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [limit - used + int(stat.get("inactive_file", 0))]
    except (OSError, ValueError):  # no container, or no limit
        return []


def default_kv_cache_bytes(weight_bytes: int) -> int:
    """4 GiB, or half of the memory that the weights leave if that is less."""
    available = available_memory()
    if available is None:
        return CPU_KV_CACHE_BYTES
    return min(CPU_KV_CACHE_BYTES, max(0, available - weight_bytes) // 2)


def batch_limits(
    max_num_seqs: int | None, max_num_batched_tokens: int | None, device: torch.device
) -> tuple[int, int]:
    """max_num_seqs and max_num_batched_tokens; if only one is given, it also bounds the other's
    default."""
    default_seqs, default_tokens = CPU_MAX_NUM_SEQS, CPU_MAX_NUM_BATCHED_TOKENS
    if device.type == "cuda":
        is_large = torch.cuda.get_device_properties(device).total_memory >= LARGE_GPU_BYTES
        default_seqs, default_tokens = (1024, 16384) if is_large else (256, 8192)
    if max_num_seqs is None:
        max_num_seqs = min(default_seqs, max_num_batched_tokens or default_seqs)
    if max_num_batched_tokens is None:
        max_num_batched_tokens = max(default_tokens, max_num_seqs)
    return max_num_seqs, max_num_batched_tokens


# GPUs


def use(device: torch.device) -> AbstractContextManager[object]:
    """A context in which kernels are launched on `device`, on its default stream whatever the
    caller's stream is: a step must see the results of the step before it."""
    if device.type == "cpu":
        return nullcontext()
    index = 0 if device.index is None else device.index
    if torch.cuda.current_device() == index and torch.cuda.current_stream().cuda_stream == 0:
        return nullcontext()  # the usual case; entering the stream's context takes longer
    return torch.cuda.stream(torch.cuda.default_stream(device))


def free_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes of a GPU, after torch has returned its cached memory."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)


def release_memory(device: torch.device) -> None:
    """Return the memory that torch caches after tensors are deleted."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        drop_workspaces()
        torch.cuda.empty_cache()


def drop_workspaces() -> None:
    """Make cuBLAS allocate its workspaces anew at its next calls, in the whole process. Inside a
    capture they then come from the CUDA graph's own memory, and live as long as the graph."""
    torch._C._cuda_clearCublasWorkspaces()
