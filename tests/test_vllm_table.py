"""docs/vllm.md has a row for every name of vLLM's offline API, and what it says is so."""

import ast
import inspect
import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from nanovllm import (
    LLM,
    AsyncLLM,
    BeamSearchParams,
    CompletionOutput,
    EngineArgs,
    LLMEngine,
    Logprob,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from nanovllm.config import VLLM_DEFAULTS, EngineConfig
from nanovllm.outputs import RequestMetrics

ROOT = Path(__file__).parents[1]
NAMES = json.loads((ROOT / "tests/data/vllm_0_26_names.json").read_text())
TESTS = "".join(
    file.read_text() for file in ROOT.glob("tests/**/test_*.py") if file != Path(__file__)
)
CLASSES = {
    cls.__name__: cls
    for cls in (
        *(RequestOutput, CompletionOutput, Logprob, RequestMetrics, EngineArgs),
        *(BeamSearchParams, StructuredOutputsParams, LLMEngine, AsyncLLM),
    )
}
SECTIONS = {
    "SamplingParams": [*NAMES["SamplingParams"], *NAMES["SamplingParams methods"]],
    "LLM(...)": list(NAMES["options"]),
    "LLM's methods": list(NAMES["LLM"]),
    **{name: list(NAMES[name]) for name in CLASSES},
}
OURS = {"supported", "differs"}
STATES = {*OURS, "refused", "no effect", "missing"}


def read_table():
    """(section, name, state, note) of each name in the document."""
    for section in re.split(r"^## ", (ROOT / "docs/vllm.md").read_text(), flags=re.M)[1:]:
        title, *lines = section.splitlines()
        for line in lines:
            if row := re.fullmatch(r"\| (`[^|]*`) \| ([a-z ]+) \|(.*)\|", line):
                for name in re.findall(r"`(.*?)`", row[1]):
                    yield title, name, row[2], row[3]


TABLE = list(read_table())
HAS = {
    "SamplingParams": {f.name for f in fields(SamplingParams)} | set(dir(SamplingParams)),
    "LLM(...)": {f.name for f in fields(EngineConfig)},
    "LLM's methods": set(dir(LLM)),
    **{
        name: set(dir(cls)) | {f.name for f in (fields(cls) if is_dataclass(cls) else ())}
        for name, cls in CLASSES.items()
    },
}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_name_has_one_row(section):
    names = [name for title, name, *_ in TABLE if title == section]
    assert sorted(names) == sorted(SECTIONS[section])
    assert {state for _, _, state, _ in TABLE} <= STATES


@pytest.mark.parametrize(("section", "name", "state"), [row[:3] for row in TABLE])
def test_a_row_says_what_is_so(section, name, state, caplog):
    has = name in HAS[section]
    if state in OURS:
        assert has
    elif state in ("missing", "no effect"):
        assert not has
    if section == "LLM(...)" and state in ("refused", "no effect"):
        assert name in VLLM_DEFAULTS
        if state == "refused":
            with pytest.raises(ValueError, match=f"{name}=.* is not supported yet; leave it out"):
                EngineConfig.from_options("folder", **{name: object()})
        else:
            EngineConfig.from_options("folder", **{name: object()})
            assert "has no effect here" in caplog.text
    elif section in ("LLM's methods", "LLMEngine") and state == "refused":
        with pytest.raises(AttributeError, match=f"vLLM's LLM.{name} is not supported: "):
            getattr(LLMEngine.__new__(LLMEngine), name)
    elif section == "SamplingParams" and state in ("refused", "missing"):
        error = ValueError if state == "refused" else TypeError
        with pytest.raises(error, match=name):
            SamplingParams(**{name: 5})


def test_defaults_are_vllms():
    ours = {f.name: f.default for f in fields(SamplingParams)}
    ours = {**ours, **{f.name: f.default for f in fields(EngineConfig)}, "model": None}
    compared = 0
    for name, default in (NAMES["SamplingParams"] | NAMES["options"]).items():
        try:
            value = ast.literal_eval(default or "")
        except (ValueError, SyntaxError):
            continue
        if name in ours or name in VLLM_DEFAULTS:
            default = ours.get(name, VLLM_DEFAULTS.get(name))
            # vLLM's LLM says None where its EngineArgs has an object.
            assert default == value or (isinstance(default, list | dict) and value is None), name
            compared += 1
    assert compared > 50


@pytest.mark.parametrize(("section", "name"), [row[:2] for row in TABLE if row[2] == "supported"])
def test_what_is_supported_was_run(section, name):
    assert re.search(rf"\b{name}\b", TESTS), f"no test uses {section}'s {name}"


CALLED = {"LLM's methods": LLM, "LLMEngine": LLMEngine, "AsyncLLM": AsyncLLM}


@pytest.mark.parametrize(
    ("section", "name", "note"),
    [
        (section, name, note)
        for section, name, state, note in TABLE
        if section in CALLED and state in OURS and callable(getattr(CALLED[section], name))
    ],
)
def test_methods_take_vllms_arguments(section, name, note):
    """In vLLM's order, which a script may rely on; the row names the missing arguments."""
    arguments = inspect.signature(getattr(CALLED[section], name)).parameters
    vllms = NAMES["LLM" if section == "LLM's methods" else section][name]
    shared = [a for a in arguments if a in vllms]
    assert shared == [a for a in vllms if a in shared]
    if all(a.kind is not a.VAR_KEYWORD for a in arguments.values()):
        assert all(a in arguments or f"`{a}`" in note for a in vllms)


def test_params_are_given_by_position_as_in_vllm():
    given = [f.name for f in fields(SamplingParams) if f.init and not f.kw_only]
    assert given == list(NAMES["SamplingParams"])[: len(given)] and len(given) == 23
    params = SamplingParams(1, 0.5, 0.25, 1.5, 0.75)
    assert (params.n, params.presence_penalty, params.frequency_penalty) == (1, 0.5, 0.25)
    assert (params.repetition_penalty, params.temperature) == (1.5, 0.75)


@pytest.mark.parametrize("cls", [RequestOutput, CompletionOutput])
def test_outputs_are_made_by_position_as_in_vllm(cls):
    given = [f.name for f in fields(cls) if not f.kw_only]
    ours = {"error"}  # behind vLLM's
    assert [name for name in given if name not in ours] == NAMES[cls.__name__][
        : len(given) - len(ours & set(given))
    ]
    values = list(range(len(given)))
    output = cls(*values)
    assert [getattr(output, name) for name in given] == values
