"""Every kernel, as its wrapper launches it, compiles for every supported GPU and fits its shared
memory. No GPU is needed: a launch is recorded and handed to Triton's compiler."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from patience import PATIENCE

CAPABILITIES = [80, 86, 89, 90, 100]
COMPILE = Path(__file__).parent / "compile_kernels.py"


def test_kernels_compile_and_fit():
    from nanovllm.ops.triton.kernel_configs import MAX_SHARED_BYTES

    with ThreadPoolExecutor(2) as pool:
        for capability, result in zip(
            CAPABILITIES, pool.map(compile_for, CAPABILITIES), strict=True
        ):
            assert result.returncode == 0, result.stderr[-3000:]
            shared = json.loads(result.stdout.splitlines()[-1])
            assert len(shared) >= 20
            over = {name: size for name, size in shared.items() if size > MAX_SHARED_BYTES}
            assert not over, (capability, over)


def compile_for(capability):
    """In a process of its own: this one may be set to interpret kernels."""
    return subprocess.run(
        [sys.executable, str(COMPILE), str(capability)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
