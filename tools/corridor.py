"""How long the reading corridor is: what one request of three tokens enters in the package.

python tools/corridor.py [--check] [--device cuda]

Counted over all threads, while LLM.generate runs one prompt: the files, the named functions
(methods too; no lambdas and comprehensions), and the lines of those functions without docstrings,
comments and blank lines; beside them all lines of the files. On a GPU the kernels that are launched
count as well. `--check` fails above the bounds in pyproject.toml, [tool.nanovllm.corridor]; CI
calls it so.
"""

import argparse
import ast
import io
import sys
import threading
import tokenize
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "nanovllm"
MODEL = ROOT / "assets" / "tiny-qwen3"
KINDS: dict[str, dict[str, Any]] = {
    "sampled": {"temperature": 0.6},
    "greedy": {"temperature": 0.0},
    "top-p": {"temperature": 0.6, "top_p": 0.9},
}
Functions = dict[Path, set[tuple[str, int]]]  # name and first line


class Recorder:
    """Notes the functions that any thread calls while `is_on`. It must be installed before the
    threads start."""

    def __init__(self) -> None:
        self.is_on = False
        self.codes: set[CodeType] = set()
        threading.setprofile(self._note)
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        if self.is_on and event == "call":
            self.codes.add(frame.f_code)

    def functions(self) -> Functions:
        """The named functions of the package."""
        found: Functions = defaultdict(set)
        for code in self.codes:
            path = Path(code.co_filename)
            if path.is_relative_to(PACKAGE) and not code.co_name.startswith("<"):
                found[path].add((code.co_name, code.co_firstlineno))
        return found


def watch_kernels(found: Functions, recorder: Recorder) -> None:
    """Add every Triton kernel that is launched while the recorder is on."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def noted_run(kernel: Any, *args: Any, **options: Any) -> Any:
        if recorder.is_on:
            code = kernel.fn.__code__
            found[Path(code.co_filename)].add((code.co_name, code.co_firstlineno))
        return run(kernel, *args, **options)

    JITFunction.run = noted_run


def code_lines(path: Path, functions: set[tuple[str, int]]) -> set[int]:
    """The lines of functions of a file that hold code, docstrings aside. A nested function's lines
    count if it is among them."""
    source = path.read_text()
    skipped = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    with_code = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            with_code.update(range(token.start[0], token.end[0] + 1))
    lines: set[int] = set()

    def visit(node: ast.AST, is_entered: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            is_entered = (node.name, first) in functions or (node.name, node.lineno) in functions
            own = set(range(node.lineno, (node.end_lineno or 0) + 1))
            lines.difference_update(own)
            if is_entered:
                lines.update(own & with_code)
            if ast.get_docstring(node, clean=False) is not None:
                text = node.body[0]
                lines.difference_update(range(text.lineno, (text.end_lineno or 0) + 1))
        for child in ast.iter_child_nodes(node):
            visit(child, is_entered)

    visit(ast.parse(source), False)
    return lines


def measure(device: str) -> dict[str, tuple[Functions, dict[str, int]]]:
    """For each kind of request the functions, and the four counts."""
    sys.path.insert(0, str(ROOT))
    recorder = Recorder()
    from nanovllm import LLM, SamplingParams

    llm = LLM(str(MODEL), device=device, max_model_len=512)
    results = {}
    for kind, values in KINDS.items():
        kernels: Functions = defaultdict(set)
        if device != "cpu":
            watch_kernels(kernels, recorder)
        recorder.codes.clear()
        recorder.is_on = True
        llm.generate("In the beginning", SamplingParams(max_tokens=3, **values), use_tqdm=False)
        recorder.is_on = False
        found = recorder.functions()
        for path, names in kernels.items():
            found[path] |= names
        counts = {
            "files": len(found),
            "functions": sum(map(len, found.values())),
            "lines": sum(len(code_lines(path, names)) for path, names in found.items()),
            "file_lines": sum(len(path.read_text().splitlines()) for path in found),
        }
        results[kind] = found, counts
        llm.reset_prefix_cache()
    llm.close()
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--check", action="store_true", help="fail above pyproject.toml's bounds")
    parser.add_argument("--list", action="store_true", help="name the files and functions")
    args = parser.parse_args()
    results = measure(args.device)
    sys.setprofile(None)
    print(f"{'one request on ' + args.device:24} files  functions  lines  (all lines of the files)")
    for kind, (_, counts) in results.items():
        print(
            f"{kind:24} {counts['files']:5}  {counts['functions']:9}  {counts['lines']:5}  "
            f"({counts['file_lines']})"
        )
    found, counts = results["sampled"]
    if args.list:
        for path, names in sorted(found.items()):
            print(f"{path.relative_to(ROOT)}: {len(code_lines(path, names))} lines")
            for name, line in sorted(names, key=lambda item: item[1]):
                print(f"  {line:4} {name}")
    if args.check:
        bounds = read_bounds()
        above = [name for name, bound in bounds.items() if counts[name] > bound]
        for name in above:
            print(f"the corridor has {counts[name]} {name}, more than its bound {bounds[name]}")
        return bool(above)
    return 0


def read_bounds() -> dict[str, int]:
    """Of pyproject.toml. Python 3.10 has no reader of TOML, and these lines are simple."""
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[tool.nanovllm.corridor]\n")[2].partition("\n[")[0]
    pairs = [line.split("#")[0].split("=") for line in section.splitlines() if "=" in line]
    return {name.strip(): int(value) for name, value in pairs}


if __name__ == "__main__":
    sys.exit(main())
