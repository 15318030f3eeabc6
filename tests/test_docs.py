"""Pages have lines of at most 100 columns, plain words and links that lead somewhere; what tools
write into docs/ is up to date."""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

from tools import house, speed_chart

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SOURCES = sorted(
    file
    for folder in ("nanovllm", "tools", "tests", "docs", ".")
    for file in (ROOT.glob("*.py") if folder == "." else ROOT.glob(f"{folder}/**/*.py"))
)
# Words that leave open what is meant, or that stand where the glossary has a term.
VAGUE = re.compile(
    r"\b(nobody|somebody|everybody|those (?:of|that)|so many|as many|theirs|page-locked)\b", re.I
)


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def prose_of_page(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.S | re.M)


def prose_of_source(text: str) -> str:
    """Comments and strings (docstrings, messages) of a Python file, one paragraph for each."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comment = string = ""
    paragraphs = []
    for token in tokens:
        if token.type == tokenize.COMMENT:
            comment += f" {token.string.lstrip('# ')}"
        elif token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
            string += f" {token.string}"
        elif token.type not in (tokenize.NL, tokenize.NEWLINE):
            paragraphs += [comment, string]
            comment = string = ""
    return "\n\n".join([*paragraphs, comment, string])


def vague_words(prose: str) -> list[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in prose.split("\n\n"))
    return [
        f"{paragraph[max(0, match.start() - 40) : match.end() + 20]}"
        for paragraph in paragraphs
        for match in VAGUE.finditer(paragraph)
    ]


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_pages_are_in_plain_words(file):
    assert not vague_words(prose_of_page(file.read_text()))


@pytest.mark.parametrize("file", [file for file in SOURCES if file != Path(__file__)], ids=name)
def test_comments_and_strings_are_in_plain_words(file):
    assert not vague_words(prose_of_source(file.read_text()))


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_lines_have_at_most_100_columns(file):
    """But tables and code blocks, which Markdown can't wrap. (ruff does so for Python files.)"""
    lines = prose_of_page(file.read_text()).splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def links_of(file: Path) -> list[tuple[str, str]]:
    """(text, target) of the links to files."""
    links = re.findall(r"\[([^\]]*)\]\(([^)#]+)(?:#[^)]*)?\)", prose_of_page(file.read_text()))
    return [(text, target) for text, target in links if "://" not in target]


@pytest.mark.parametrize("file", PAGES, ids=name)
def test_links_lead_to_files(file):
    missing = [target for _, target in links_of(file) if not (file.parent / target).exists()]
    assert not missing


def names_in(source: str) -> set[str]:
    """Functions, methods (also as Class.method), classes and fields of a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(f"{node.name}.{child.name}")
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = [node.target] if isinstance(node, ast.AnnAssign) else node.targets
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def test_the_tour_names_what_the_files_have():
    """A function in the tour, `name()`, is in one of the files linked before it in its section.
    Calls of LLM, `llm.name()`, need no link."""
    page = ROOT / "docs/tour.md"
    checked = 0
    for section in re.split("^## ", prose_of_page(page.read_text()), flags=re.M):
        known = {f"llm.{name}" for name in names_in((ROOT / "nanovllm/llm.py").read_text())}
        for target, function in re.findall(r"\]\(([^)#]+\.py)\)|`([A-Za-z_.]+)\(\)`", section):
            if target:
                known |= names_in((page.parent / target).read_text())
            else:
                assert function in known, f"{function} in: {section.splitlines()[0]}"
                checked += 1
    assert checked >= 15


def test_speed_is_what_was_recorded():
    tables = speed_chart.read_tables(ROOT / "docs/speed")
    [charted] = [table for table in tables if table.get("chart")]
    run = "run python tools/speed_chart.py"
    assert (ROOT / "docs/speed.svg").read_text() == speed_chart.draw(charted), run
    assert (ROOT / "docs/speed.md").read_text() == speed_chart.write_page(tables), run


def test_reports_of_bench_replace_rows(tmp_path):
    table, report = tmp_path / "table.json", tmp_path / "report.json"
    table.write_text((ROOT / "docs/speed/h200.json").read_text())
    vllm, ours = {"tokens_per_second": 20000.06}, {"tokens_per_second": 30000, "ideal_seconds": 2.0}
    content = {"workload": "short", "model": "qwen3-0.6b with random weights"}
    content |= {"output_tokens": 80000, "engines": {"nanovllm": ours, "vllm": vllm}}
    report.write_text(json.dumps(content))
    before = json.loads(table.read_text())
    speed_chart.add_reports(table, [report])
    after = json.loads(table.read_text())
    assert len(after["rows"]) == len(before["rows"])
    row = after["rows"][1]
    assert (row["workload"], row["shape"], row["unit"]) == ("short", "qwen3-0.6b", "tok/s")
    assert (row["nanovllm"], row["vLLM"], row["ideal"]) == (30000, 20000.1, 40000.0)
    assert {k: v for k, v in after.items() if k != "rows"} == {
        k: v for k, v in before.items() if k != "rows"
    }
    assert "30,000  (75%)" in speed_chart.draw(after)


def test_the_house_is_drawn_as_it_is():
    page = (ROOT / "docs/house.md").read_text()
    assert page == house.write_page(), "run python tools/house.py"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
