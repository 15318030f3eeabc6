"""Draw docs/speed.svg and write docs/speed.md from the recorded results in docs/speed/*.json.

python tools/speed_chart.py                                   # after a change of a JSON file
python tools/speed_chart.py --add docs/speed/h200.json REPORT ...   # outputs of bench.py --json

A file is one table: title, hardware, software, date, commit, command, notes, engines (columns, ours
first) and rows. A row has workload, shape, unit, a figure for each engine that ran, and what the
hardware allows: `ideal` in the row's unit, or `of_ideal`, our share of it in percent. The file with
`"chart": true` is the one in the chart, with its rows that have an ideal. Figures in seconds and
microseconds are better when they are smaller. --add puts the rates of bench.py's reports into rows;
date, commit and hardware are for the person who measured to write.
"""

import argparse
import json
from html import escape
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
ORDER = ("h200.json", "h200-more.json", "h200-attention.json", "h100.json", "cpu.json")
NAMES = {"qwen3-0.6b": "Qwen3-0.6B", "qwen3-8b": "Qwen3-8B", "llama-3.2-1b": "Llama-3.2-1B"}
COLOURS = ("#2563eb", "#9ca3af", "#d1a054")
# The chart in pixels: the width of labels and of the bars up to the ideal, a bar's height.
LABELS, BARS, BAR, WIDTH = 190, 480, 15, 780

Table = dict[str, Any]
Row = dict[str, Any]


def read_tables(folder: Path) -> list[Table]:
    """The tables in the order of ORDER, then by the names of their files."""
    files = sorted(folder.glob("*.json"), key=lambda f: ((*ORDER, f.name).index(f.name), f.name))
    return [json.loads(file.read_text()) for file in files]


def number(value: float) -> str:
    """From 1,000 on without decimals, smaller ones as they were recorded."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:,}"


def share(row: Row, engine: str) -> float:
    """Part of the ideal that an engine reaches."""
    value, ideal = row[engine], row["ideal"]
    return ideal / value if row["unit"] in ("s", "us") else value / ideal


def ratio(row: Row, ours: str, peer: str) -> float:
    """How many times as fast (or small) ours is."""
    smaller_is_better = row["unit"] in ("s", "us", "GiB")
    return row[peer] / row[ours] if smaller_is_better else row[ours] / row[peer]


def draw(table: Table) -> str:
    """The chart as SVG: for each row a bar for each engine, as its share of the ideal."""
    engines = table["engines"]
    rows = [row for row in table["rows"] if "ideal" in row]
    parts, y = [], 64
    for i, engine in enumerate(engines):
        x = LABELS + 110 * i
        parts.append(f'<rect x="{x}" y="18" width="12" height="12" fill="{COLOURS[i]}"/>')
        parts.append(f'<text x="{x + 18}" y="29">{escape(engine)}</text>')
    parts.append(f'<text x="{LABELS + BARS}" y="29" text-anchor="middle">ideal</text>')
    top = y - 12
    for row in rows:
        bars = [engine for engine in engines if engine in row]
        middle = y + BAR * len(bars) / 2
        label = f"{row['workload']}, {NAMES.get(row['shape'], row['shape'])}"
        parts.append(
            f'<text x="{LABELS - 12}" y="{middle + 5}" text-anchor="end">{escape(label)}</text>'
        )
        for engine in bars:
            part = share(row, engine)
            width = round(BARS * part, 1)
            unit = "" if row["unit"] == "tok/s" else f" {row['unit']}"
            text = f"{number(row[engine])}{unit}  ({part:.0%})"
            colour = COLOURS[engines.index(engine)]
            parts.append(
                f'<rect x="{LABELS}" y="{y}" width="{width}" height="{BAR - 2}" fill="{colour}"/>'
                f'<text class="figure" x="{LABELS + width + 6}" y="{y + 11}">{text}</text>'
            )
            y += BAR
        y += 14
    timed = dict.fromkeys(row["workload"] for row in rows if row["unit"] == "s")
    in_seconds = f" ({', '.join(timed)}: seconds)" if timed else ""
    line = f'x1="{LABELS + BARS}" x2="{LABELS + BARS}" y1="36" y2="{y - 10}"'
    parts.append(f'<line {line} stroke="#6b7280" stroke-dasharray="4 3"/>')
    parts.append(
        f'<line x1="{LABELS}" x2="{LABELS}" y1="{top}" y2="{y - 10}" stroke="#6b7280"/>'
        f'<text class="figure" x="{LABELS}" y="{y + 10}">output tokens a second{in_seconds} and '
        "the share of what the hardware allows</text>"
        f'<text class="figure" x="{LABELS}" y="{y + 28}">{escape(table["title"])}, '
        f"{table['date']}, commit {table['commit']}</text>"
    )
    height = y + 44
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}">\n'
        "<style>text { font: 14px sans-serif; fill: #1f2328 } .figure { font-size: 12px; "
        "paint-order: stroke; stroke: #ffffff; stroke-width: 4px }</style>\n"
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def wrap(text: str, width: int = 100) -> list[str]:
    """Lines of at most `width` columns; code between backticks may contain spaces."""
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line]


def write_table(table: Table) -> str:
    """One section of docs/speed.md."""
    ours, *peers = table["engines"]
    has_ideal = any("ideal" in row or "of_ideal" in row for row in table["rows"])
    header = ["workload", "", "unit", ours, *(["of ideal"] if has_ideal else []), *peers]
    lines = [f"## {table['title']}", ""]
    facts = ("hardware", "software", "date", "commit")
    lines += wrap(". ".join(f"{fact.capitalize()}: {table[fact]}" for fact in facts) + ".")
    lines += ["", "```", table["command"], "```", ""]
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in table["rows"]:
        cells = [row["workload"], NAMES.get(row["shape"], row["shape"]), row["unit"]]
        cells.append(number(row[ours]))
        if has_ideal:
            percent = share(row, ours) * 100 if "ideal" in row else row.get("of_ideal")
            cells.append("" if percent is None else f"{percent:.0f}%")
        for peer in peers:
            cell = f"{number(row[peer])} ({ratio(row, ours, peer):.2f} x)" if peer in row else ""
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    for note in table["notes"]:
        lines += ["", *wrap(note)]
    return "\n".join(lines)


INTRODUCTION = """\
# Speed

Written by [tools/speed_chart.py](../tools/speed_chart.py) from the results in [speed/](speed).

Behind a peer's figure stands nanovllm's advantage: 1.25 x is a quarter more tokens a second, or a
time (or memory) of four fifths. The ideal is what this hardware allows: bench.py measures how fast
memory is read and matrices are multiplied, and takes for each step the longer of the two times,
with weights read once a step, and keys and values once a token. Hosts differ by several percent, so
only figures of one call on one machine make a ratio. `make_workload` in [bench.py](../bench.py) has
the workloads."""


def write_page(tables: list[Table]) -> str:
    return "\n\n".join([INTRODUCTION, *map(write_table, tables)]) + "\n"


def add_reports(file: Path, reports: list[Path]) -> None:
    """Put the rates of bench.py's reports into a table: each replaces the row of its workload and
    shape, or is a new row at the end."""
    table = json.loads(file.read_text())
    names = {"vllm": "vLLM"}
    for report in (json.loads(path.read_text()) for path in reports):
        key = {"workload": report["workload"], "shape": report["model"].split()[0]}
        row: Row = {**key, "unit": "tok/s"}
        for engine, result in report["engines"].items():
            row[names.get(engine, engine)] = round(result["tokens_per_second"], 1)
        ideal_seconds = report["engines"]["nanovllm"]["ideal_seconds"]
        row["ideal"] = round(report["output_tokens"] / ideal_seconds, 1)
        same = [i for i, r in enumerate(table["rows"]) if {k: r.get(k) for k in key} == key]
        place = same[0] if same else len(table["rows"])
        table["rows"][place : place + 1] = [row]
    rows = ",\n".join(f"    {json.dumps(row)}" for row in table.pop("rows"))
    head = json.dumps(table, indent=2).removesuffix("\n}")
    file.write_text(f'{head},\n  "rows": [\n{rows}\n  ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--add", type=Path, metavar="TABLE", help="the table to put reports into")
    parser.add_argument("reports", type=Path, nargs="*", help="outputs of bench.py --json")
    args = parser.parse_args()
    if args.add:
        add_reports(args.add, args.reports)
    tables = read_tables(DOCS / "speed")
    [charted] = [table for table in tables if table.get("chart")]
    DOCS.joinpath("speed.svg").write_text(draw(charted))
    DOCS.joinpath("speed.md").write_text(write_page(tables))


if __name__ == "__main__":
    main()
