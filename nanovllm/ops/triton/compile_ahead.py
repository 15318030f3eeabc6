"""Compiles Triton kernels before their first launch, all of them at the same time.

worker/compile_ahead.py has a step's launches noted while weights are read. Compiling takes a second
a kernel and more, most of it in LLVM and ptxas, which don't hold Python's lock: threads will do.
Some versions of Triton also have a C compiler make a launcher for each signature, which takes as
long as a small kernel.
"""

import copy
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import knobs
from triton.runtime import driver

logger = logging.getLogger(__name__)

_HOOK = threading.Lock()  # Triton has one for the whole process


class KernelCompiler:
    """Threads that compile for one GPU. Making it takes a second: what every launch needs.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device):
        self.noted: set[tuple[Any, str]] = set()
        self.launchers: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self.pool = ThreadPoolExecutor(
            os.cpu_count(), "nanovllm-compile", torch.cuda.set_device, (device,)
        )

    @contextmanager
    def instead_of_launches(self) -> Iterator[list[Future[None]]]:
        """Within it, kernels that this thread launches for the first time are not run but handed to
        the threads; what they should have written is anything. Once compiled they run. Gives what
        has to end for all to be."""
        with _HOOK:
            yield from self._instead_of_launches()

    def _instead_of_launches(self) -> Iterator[list[Future[None]]]:
        thread, former = threading.get_ident(), knobs.runtime.jit_cache_hook
        futures: list[Future[None]] = []

        def hook(**launch: Any) -> bool | None:
            # Triton calls this before it compiles; True: it neither compiles nor launches.
            if launch["is_manual_warmup"] or threading.get_ident() != thread:
                return former(**launch) if former else None
            kernel, compile = launch["fn"].jit_function, launch["compile"]
            if (kernel, launch["key"]) not in self.noted:
                self.noted.add((kernel, launch["key"]))
                data = compile["specialization_data"]
                futures.append(self.pool.submit(self._compile, kernel, data))
            return True

        knobs.runtime.jit_cache_hook = hook
        try:
            yield futures
        finally:
            knobs.runtime.jit_cache_hook = former

    def close(self, cancel: bool) -> None:
        """Take no more; what has been handed over is still compiled, unless it is cancelled."""
        self.pool.shutdown(wait=False, cancel_futures=cancel)

    def _compile(self, kernel: Any, specialization_data: str) -> None:
        start = time.perf_counter()
        try:
            # First a copy: launches find what the kernel itself has, and one without a launcher
            # would have the worker wait for the C compiler.
            unseen = copy.copy(kernel)
            unseen.device_caches = defaultdict(unseen.create_binder)
            self._make_launcher(unseen.preload(specialization_data))
            kernel.preload(specialization_data)  # from the cache on the disk
        except Exception:
            # The launch compiles the kernel once more, and its error names the caller.
            logger.debug("%s is not compiled ahead", kernel.__name__, exc_info=True)
        logger.debug("compiled %s in %.2f s", kernel.__name__, time.perf_counter() - start)

    def _make_launcher(self, compiled: Any) -> None:
        """It stays on the disk too, for all kernels of a signature: the first makes it."""
        with self.launchers[str(compiled.src.signature)]:
            driver.active.launcher_cls(compiled.src, compiled.metadata)
