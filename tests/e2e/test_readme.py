"""The Python blocks of the README and docs/api.md, and example.py, run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = [
    pytest.param(code, id=f"{name} {i}")
    for name in ("README.md", "docs/api.md")
    for i, code in enumerate(re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.S))
]


@pytest.mark.parametrize("code", BLOCKS)
def test_block_runs_and_prints(code, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip()


def test_example_answers_every_prompt():
    done = subprocess.run(
        [sys.executable, "example.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("Prompt: ") == done.stdout.count("Answer: ") >= 3
    assert "I am a tiny language model" in done.stdout
    assert "[stop]" in done.stdout
    assert "nanovllm.llm: Qwen3ForCausalLM on cpu" in done.stderr
