"""Kernels that are compiled ahead are not compiled again. No GPU is needed: the driver is a fake,
in a process of its own, as this one may be set to interpret kernels."""

import os
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE


def test_launches_find_what_is_compiled_ahead_with_its_launcher_or_not_at_all(tmp_path):
    result = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "compile_ahead_calls.py")],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    early, again = result.stdout.splitlines()[-2:]
    assert (early, again) == ("[]", "[]")
