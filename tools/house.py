"""Write docs/house.md: the rooms of the package and their imports, as they are in the code.

python tools/house.py

A room is a folder of the package, or a file at its root; the tests of docs compare the page with
the code. import-linter holds the direction of the imports (pyproject.toml).
"""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanovllm"
# Files at the root that are drawn together with others.
FACE = {"__init__": "nanovllm", "__main__": "entrypoints"}
OPTIONS = ("arguments", "config", "engine_args", "outputs", "sampling_params")
ROOTS = dict.fromkeys(OPTIONS, "options")
ABOUT = {
    "entrypoints": "the command line, batch files, lm-eval, the view of each step",
    "nanovllm": "the names that `import nanovllm` has",
    "async_llm": "`AsyncLLM`: the client for asyncio",
    "llm_engine": "`LLMEngine`: an `LLM` that is stepped by hand, by vLLM's names",
    "llm": "`LLM`: the client for scripts, and the one place that makes engine and worker",
    "frontend": "text and requests: prompts, chat, grammars, scoring, beams",
    "engine": "scheduler, block manager, sequences, detokenizer; no torch",
    "worker": "what runs a step: state of the rows, inputs, CUDA graphs, sampling",
    "models": "a file for each family, the frame around them, loading",
    "layers": "linear, attention, MLP, norm, RoPE, the residual stream",
    "quantization": "weight formats of a `Linear`",
    "distributed": "tensor parallelism and replicas",
    "ops": "operations: torch as reference and CPU path, choice of the kernel, the batch",
    "ops.triton": "Triton kernels, and what launches them",
    "core": "what crosses rooms: a step, the model's config, metrics; no torch",
    "options": "options and how they are given, parameters, results",
}


def room_of(module: str) -> str:
    """The room of nanovllm.a.b."""
    parts = module.split(".")[1:]
    if parts[:2] == ["ops", "triton"]:
        return "ops.triton"
    first = parts[0] if parts else "__init__"
    return FACE.get(first, ROOTS.get(first, first))


def modules() -> dict[str, Path]:
    names = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(part for part in parts if part != "__init__")] = file
    return names


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The package's modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in known:
            for alias in node.names:
                child = f"{node.module}.{alias.name}"
                yield child if child in known else str(node.module)


def edges() -> dict[str, set[str]]:
    """Which rooms each room imports."""
    known = modules()
    result: dict[str, set[str]] = {room_of(module): set() for module in known}
    for module, file in known.items():
        result[room_of(module)] |= {room_of(name) for name in imports(file, known)}
    return {room: rooms - {room} for room, rooms in result.items()}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for room in graph[todo.pop()] - found:
            found.add(room)
            todo.append(room)
    return found


def write_page() -> str:
    graph = edges()
    rooms = [room for room in ABOUT if room in graph] + sorted(set(graph) - set(ABOUT))
    drawing = ["```mermaid", "flowchart TD"]
    for room in rooms:
        drawing.append(f'    {room.replace(".", "_")}["{room}"]')
    for room in rooms:
        for target in [r for r in rooms if r in graph[room]]:
            # An arrow that follows from others is left out.
            if not any(target in reachable(graph, other) for other in graph[room] - {target}):
                drawing.append(f"    {room.replace('.', '_')} --> {target.replace('.', '_')}")
    drawing.append("```")
    table = ["| room | modules | imports |", "|---|---|---|"]
    for room in rooms:
        own = [file for module, file in modules().items() if room_of(module) == room]
        names = ", ".join(file.stem for file in own if file.stem != "__init__")
        targets = ", ".join(r for r in rooms if r in graph[room])
        table.append(f"| {room} | {names} | {targets} |")
    about = [
        line
        for room in rooms
        for line in textwrap.wrap(
            f"- **{room}**: {ABOUT.get(room, '')}.", 100, subsequent_indent="  "
        )
    ]
    introduction = textwrap.fill(
        "Written by [tools/house.py](../tools/house.py) from the imports in the code. An arrow "
        "says that a room imports another one; arrows that follow from others are left out, the "
        "table at the end has all. Imports go one way, from top to bottom, held by import-linter.",
        100,
    )
    parts = ["# The house", introduction, "\n".join(drawing), "\n".join(about), "\n".join(table)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    ROOT.joinpath("docs/house.md").write_text(write_page())
