"""Launch kernels with a driver that has no GPU, first for a KernelCompiler, then again; prints
which were not compiled by then."""

import os
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).parents[2])]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

from nanovllm.ops import triton_linear, triton_ops, triton_sampling  # noqa: E402
from nanovllm.ops.compile_ahead import KernelCompiler  # noqa: E402


class Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def launch():
    x, weight = torch.zeros(2, 1, 64, dtype=torch.bfloat16)
    triton_ops.rms_norm(x, weight[0], 1e-6)
    triton_ops.rms_norm(x, weight[0], 1e-5)
    triton_ops.silu_and_mul(x)
    triton_linear.linear(x, weight)
    triton_sampling.sample(torch.zeros(2, 200), torch.ones(2), torch.zeros(2, 2).long())


triton.runtime.driver.set_active(Driver())
torch.cuda.set_device = lambda device: None
compiler = KernelCompiler(torch.device("cuda", 0))
with compiler.instead_of_launches() as compiling:
    launch()
compiler.close(cancel=False)
assert [future.result(timeout=300) for future in compiling] == [None] * 5
again = []


def note(fn, **_):
    again.append(fn.name)
    return True


# A kernel that is there would be launched, which this driver can't.
Kernel = triton.compiler.CompiledKernel
Kernel.run = Kernel.launch_metadata = lambda *_: None
Kernel._init_handles = lambda self: setattr(self, "run", lambda *_: None)
triton.knobs.runtime.jit_cache_hook = note
launch()
print(again)
