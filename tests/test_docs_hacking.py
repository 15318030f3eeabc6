"""docs/hacking/: each experiment runs as it stands, in at most 60 lines, and shows what it is for;
docs/hacking.md quotes it."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(ROOT.glob("docs/hacking/*.py"))


@pytest.fixture
def run(monkeypatch):
    """Run main() of a file of docs/hacking, from the clone's root."""
    monkeypatch.chdir(ROOT)
    return lambda name: runpy.run_path(f"docs/hacking/{name}.py")["main"]()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_experiment_is_short_and_on_the_page(file):
    assert len(file.read_text().splitlines()) <= 60
    assert f"(hacking/{file.name})" in (ROOT / "docs/hacking.md").read_text()


def test_the_page_quotes_the_files():
    page = (ROOT / "docs/hacking.md").read_text()
    code = "\n".join(file.read_text() for file in FILES)
    quotes = re.findall(r"```python\n(.*?)```", page, re.S)
    assert len(quotes) == len(FILES) == 6
    for quote in quotes:
        assert quote in code


def test_a_logits_processor(run):
    plain, careful = run("logits_processor")
    assert plain > 0 and careful == 0


def test_watching_the_cache(run):
    steps = run("watching_the_cache")
    assert steps[0].hit_tokens > 0 and steps[0].shared > 0
    assert steps[-1].held == 0 and steps[-1].cached > 0


def test_a_scheduling_policy(run):
    assert run("scheduling_policy") == [10, 20, 30, 40]


def test_a_new_family(run, monkeypatch):
    from nanovllm import models

    monkeypatch.setattr(models, "REGISTRY", dict(models.REGISTRY))
    assert len(run("new_family")) == 16


def test_an_attention_variant(run):
    everything, sinks = run("attention_variant")
    assert everything[:40] == sinks[:40] and everything != sinks


def test_another_eviction_rule(run):
    least_recently_used, keep_hits = run("cache_eviction")
    assert least_recently_used == 0 and keep_hits == 47
