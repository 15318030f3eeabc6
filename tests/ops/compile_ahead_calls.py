"""Launch kernels with a driver that has no GPU, for a KernelCompiler until all are compiled, then
again. Prints what was launched before its launcher was made, and what was not compiled by then."""

import os
import sys
import time
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from nanovllm.ops.triton import layers as triton_ops  # noqa: E402
from nanovllm.ops.triton import linear as triton_linear  # noqa: E402
from nanovllm.ops.triton import sampling as triton_sampling  # noqa: E402
from nanovllm.ops.triton.compile_ahead import KernelCompiler  # noqa: E402

launchers, early = [], set()


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata):
        """Takes its time if it is the first."""
        if source.signature not in launchers:
            time.sleep(0.3)
        launchers.append(source.signature)


def run(kernel, *_):
    if kernel.src.signature not in launchers:
        early.add(kernel.name)


def launch():
    x, weight = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    triton_ops.rms_norm(x, weight[0], 1e-6)
    triton_ops.rms_norm(x, weight[0], 1e-5)
    triton_ops.silu_and_mul(x)
    triton_linear.linear(x, weight)
    triton_sampling.sample(torch.zeros(2, 200), torch.ones(2), torch.zeros(2, 2).long())


# A kernel that is there would be launched, which this driver can't.
Kernel = triton.compiler.CompiledKernel
Kernel.run, Kernel.launch_metadata = run, lambda *_: None
Kernel._init_handles = lambda self: setattr(self, "run", lambda *_: None)
triton.runtime.driver.set_active(Driver())
torch.cuda.set_device = lambda device: None
compiler = KernelCompiler(torch.device("cuda", 0))
with compiler.instead_of_launches() as compiling:
    launch()
    while not all(future.done() for future in compiling):
        launch()
compiler.close(cancel=False)
assert [future.result() for future in compiling] == [None] * 5
again = []


def note(fn, **_):
    again.append(fn.name)
    return True


triton.knobs.runtime.jit_cache_hook = note
launch()
print(sorted(early))
print(again)
