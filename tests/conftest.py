"""Fixtures that several folders of tests share: the model in the box, and altered copies of it."""

import json
import os
import shutil
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
    """Tests marked gpu run where there is one; they are chosen by -m gpu."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if is_for_gpus(item):
            item.add_marker(skip)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """All other tests are of the CPU: where there is a GPU they, and the processes that they start,
    don't see it."""
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


@pytest.fixture
def crowded(monkeypatch):
    """The engine believes that every sequence ends at once: it admits too many, and preempts."""
    monkeypatch.setattr("nanovllm.engine.scheduler.expected_steps", lambda tokens, *_: 0 * tokens)
