"""Processes that compile Triton kernels beside this one, whose Python is busy enough.

worker.py has them made before it does anything else, compile_ahead.py gives them work. What they
compile lies in Triton's cache on the disk then.
"""

import os
import signal
import threading
import warnings
from contextlib import suppress
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NoReturn

KERNELS = ("triton_attention", "triton_linear", "triton_ops", "triton_rows", "triton_sampling")


class CompileProcesses:
    """They are forked, as importing torch once more would take longer than they save, and never
    touch the GPU. They end when nobody holds this object any more, or this process ends.

    Args:
        number: of processes.
    """

    def __init__(self, number: int):
        pairs = [Pipe() for _ in range(number)]
        with warnings.catch_warnings():
            # Libraries' threads, which may_fork does not see, hold no lock that compiling takes.
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            if os.fork() == 0:
                _divide(pairs)
            os._exit(0)  # so that nobody has to wait for the others' ends
        with suppress(ChildProcessError):  # where SIGCHLD is ignored
            os.waitpid(child, 0)
        self.idle: SimpleQueue[Connection] = SimpleQueue()
        for ours, theirs in pairs:
            theirs.close()
            self.idle.put(ours)

    def compile(self, kernel: Any, specialization_data: str, target: Any) -> None:
        """Have one of them compile a kernel, and wait.

        Args:
            kernel: a JITFunction at the top of a module.
            specialization_data: as Triton's jit_cache_hook has it.
            target: the GPU, as a GPUTarget.

        Raises:
            RuntimeError: it could not.
        """
        connection = self.idle.get()
        try:
            task = kernel.fn.__module__, kernel.fn.__name__, specialization_data, target
            connection.send(task)
            error = connection.recv()
        except (OSError, EOFError) as gone:
            error = repr(gone)
        finally:
            self.idle.put(connection)
        if error is not None:
            raise RuntimeError(error)


def may_fork() -> bool:
    """Whether no other thread runs, which might hold a lock that a fork would keep forever."""
    return hasattr(os, "fork") and threading.active_count() == 1


def _divide(pairs: list[tuple[Connection, Connection]]) -> NoReturn:
    """Import what all of them need, and fork each."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all
        for ours, _ in pairs:
            ours.close()  # only its end tells them that nobody is there
        for module in KERNELS:
            import_module(f"nanovllm.ops.{module}")
        for _, mine in pairs:
            if os.fork() == 0:
                for _, other in pairs:
                    if other is not mine:
                        other.close()
                _serve(mine)
                break
    finally:
        os._exit(0)


def _serve(connection: Connection) -> None:
    from triton.runtime import driver

    while True:
        try:
            module, name, specialization_data, target = connection.recv()
        except EOFError:
            return
        error = None
        try:
            driver.set_active(_Driver(target))
            getattr(import_module(module), name).preload(specialization_data)
        except Exception as failure:
            error = repr(failure)
        connection.send(error)


class _Driver:
    """All that compiling asks of a driver."""

    def __init__(self, target: Any):
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target
