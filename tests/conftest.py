"""Fixtures that several folders of tests share: the model in the box, and altered copies of it."""

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

cuda_is_available = torch.cuda.is_available
HAS_GPU = cuda_is_available()
VISIBLE_GPUS = os.environ.get("CUDA_VISIBLE_DEVICES")
if not HAS_GPU:
    # Triton reads it when a kernel is defined: without a GPU kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"

TINY = Path(__file__).parents[1] / "assets" / "tiny-qwen3"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The checkpoint in the box. Only to be read."""
    return TINY


@pytest.fixture(scope="session")
def llm():
    """One engine in float32 for all tests that leave it as they found it."""
    from nanovllm import LLM

    with LLM(str(TINY), device="cpu", dtype="float32", kv_cache_memory_bytes=12 << 20) as llm:
        yield llm


@pytest.fixture(scope="module")
def one_thread():
    """For steps so small that threads waiting for each other would take most of the time."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def copy_tiny(tmp_path):
    """Makes a copy of the checkpoint in the box. Arguments name its JSON files and give what to
    change in them; None takes a key out."""

    def copy(**changes: dict) -> Path:
        folder = tmp_path / "copy"
        shutil.copytree(TINY, folder)
        for stem, change in changes.items():
            file = folder / f"{stem}.json"
            content = json.loads(file.read_text()) | change
            file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
        return folder

    return copy


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped on machines without a GPU; -m gpu selects them."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if is_for_gpus(item):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """All other tests test the CPU: on a machine with a GPU they, and the processes that they
    start, don't see it."""
    if not HAS_GPU:
        return
    if is_for_gpus(item):
        torch.cuda.is_available = cuda_is_available
        if VISIBLE_GPUS is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE_GPUS
    else:
        torch.cuda.is_available = lambda: False
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def is_for_gpus(item):
    return "gpu" in item.keywords or "multigpu" in item.keywords


@pytest.fixture(autouse=True)
def card(request):
    """Tests marked `alone` fill the GPU's memory or count what is free: no other test of the same
    machine, in whatever process, runs beside them."""
    if not HAS_GPU or not is_for_gpus(request.node):
        yield
        return
    folder = Path(tempfile.gettempdir())
    with ExitStack() as stack:
        door, room = (
            stack.enter_context((folder / f"nanovllm_tests_{name}").open("w"))
            for name in ("door", "room")
        )
        # The door lets no other test in while one waits to be alone.
        fcntl.flock(door, fcntl.LOCK_EX)
        fcntl.flock(room, fcntl.LOCK_EX if "alone" in request.keywords else fcntl.LOCK_SH)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield


@pytest.fixture
def crowded(monkeypatch):
    """The engine believes that every sequence ends at once: it admits too many, and preempts."""
    monkeypatch.setattr("nanovllm.engine.scheduler.expected_steps", lambda tokens, *_: 0 * tokens)
