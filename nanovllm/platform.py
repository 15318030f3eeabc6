"""What differs by device: which there are, what they compute fast, how much memory they have.

llm.py and the worker ask; kernels are chosen in ops/, not here.
"""

import logging
import os
from pathlib import Path

import torch

# Weights and the KV cache in pages of 2 MiB where Linux has them: fewer page faults, longer
# prefetches. torch reads it at its first allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

logger = logging.getLogger(__name__)

GIB = 2**30
CPU_MAX_NUM_SEQS = 256
CPU_MAX_NUM_BATCHED_TOKENS = 1024  # more gain nothing, and outgrow the CPU's caches
CPU_KV_CACHE_BYTES = 4 * GIB


def resolve_device(name: str) -> torch.device:
    """The device that an option names. Raises ValueError for one that cannot be used."""
    if name in ("auto", "cpu"):
        return torch.device("cpu")
    if name.split(":")[0] == "cuda":
        raise ValueError(
            f"device={name!r} is not supported yet: this version runs on the CPU; leave device out"
        )
    raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}")


def resolve_dtype(name: str, checkpoint_dtype: str | None) -> torch.dtype:
    """The dtype to compute in. "auto" is the checkpoint's, but half precision only as bfloat16 and
    only where the CPU multiplies it in hardware: elsewhere float32 is several times faster."""
    if name != "auto":
        return getattr(torch, name)
    if checkpoint_dtype not in ("bfloat16", "float16"):
        return torch.float32
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
    """Linux's names of the CPU's features; empty elsewhere, which only costs speed."""
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
    """Bytes that new allocations on the CPU may take, or None where the system doesn't say."""
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
    """What a container's limit (cgroup 2) leaves; page cache that it can drop counts as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return [limit - used + int(stat.get("inactive_file", 0))]
    except (OSError, ValueError):  # none, or no limit
        return []


def default_kv_cache_bytes(weight_bytes: int) -> int:
    """4 GiB, or half of the memory that the weights leave if that is less."""
    available = available_memory()
    if available is None:
        return CPU_KV_CACHE_BYTES
    return min(CPU_KV_CACHE_BYTES, max(0, available - weight_bytes) // 2)


def batch_limits(max_num_seqs: int | None, max_num_batched_tokens: int | None) -> tuple[int, int]:
    """The two limits of a batch; where only one is given, the other's default gives way to it."""
    if max_num_seqs is None:
        max_num_seqs = min(CPU_MAX_NUM_SEQS, max_num_batched_tokens or CPU_MAX_NUM_SEQS)
    if max_num_batched_tokens is None:
        max_num_batched_tokens = max(CPU_MAX_NUM_BATCHED_TOKENS, max_num_seqs)
    return max_num_seqs, max_num_batched_tokens
