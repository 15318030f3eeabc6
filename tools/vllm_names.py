"""The names in vLLM's offline API, read from its sources; docs/vllm.md has a row for each.

    pip download vllm==0.26.0 --no-deps && unzip -q vllm-*.whl 'vllm/*.py'
    python tools/vllm_names.py vllm > tests/data/vllm_0_26_names.json

Nothing is imported: vLLM need not be installed.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any

MIXINS = {
    "entrypoints/llm.py": "LLM",
    "entrypoints/offline_utils.py": "OfflineInferenceMixin",
    "entrypoints/pooling/offline.py": "PoolingOfflineMixin",
    "entrypoints/generate/beam_search/offline.py": "BeamSearchOfflineMixin",
}


def class_body(file: Path, name: str) -> list[ast.stmt]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    [body] = [node.body for node in tree.body if getattr(node, "name", None) == name]
    return body


def class_fields(file: Path, name: str) -> dict[str, str | None]:
    """Public annotated names, with the source of their defaults."""
    return {
        node.target.id: ast.unparse(node.value) if node.value else None
        for node in class_body(file, name)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.target, ast.Name)
        and not node.target.id.startswith("_")
    }


def functions(file: Path, name: str) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    """Of overloads the last one, which has the body."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return {n.name: n for n in class_body(file, name) if isinstance(n, kinds)}


def methods(file: Path, name: str) -> dict[str, list[str]]:
    """Public methods and properties, with the names of their arguments."""
    return {
        name: [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg not in SELF]
        for name, node in functions(file, name).items()
        if not name.startswith("_")
    }


SELF = ("self", "cls")


def init_defaults(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, str | None]:
    args = function.args
    known = zip(args.kwonlyargs, args.kw_defaults, strict=True)
    return {"model": None} | {a.arg: ast.unparse(d) if d else None for a, d in known}


def main(root: Path) -> None:
    params, outputs = root / "sampling_params.py", root / "outputs.py"
    engine_args = dict.fromkeys(class_fields(root / "engine/arg_utils.py", "EngineArgs"))
    request_output = functions(outputs, "RequestOutput")
    init = request_output["__init__"].args
    fields = [a.arg for a in (*init.args, *init.kwonlyargs) if a.arg != "self"]
    own: dict[str, list[str]] = {}
    for file, name in MIXINS.items():
        own |= methods(root / file, name)
    names: dict[str, Any] = {
        "version": "0.26.0",
        "SamplingParams": class_fields(params, "SamplingParams"),
        "SamplingParams methods": methods(params, "SamplingParams"),
        "options": engine_args
        | init_defaults(functions(root / "entrypoints/llm.py", "LLM")["__init__"]),
        "LLM": own,
        "RequestOutput": [*fields, *methods(outputs, "RequestOutput")],
        "CompletionOutput": [
            *class_fields(outputs, "CompletionOutput"),
            *methods(outputs, "CompletionOutput"),
        ],
        "Logprob": list(class_fields(root / "logprobs.py", "Logprob")),
        "RequestMetrics": list(class_fields(root / "v1/metrics/stats.py", "RequestStateStats")),
        "BeamSearchParams": class_fields(params, "BeamSearchParams"),
        "StructuredOutputsParams": class_fields(params, "StructuredOutputsParams"),
        "EngineArgs": methods(root / "engine/arg_utils.py", "EngineArgs"),
        "LLMEngine": methods(root / "v1/engine/llm_engine.py", "LLMEngine"),
        "AsyncLLM": methods(root / "v1/engine/async_llm.py", "AsyncLLM"),
    }
    print(json.dumps(names, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
