"""Draw steps of example.py --watch, in colour, as the picture in docs/tour.md.

FORCE_COLOR=1 python example.py --watch |
    python tools/watch_picture.py docs/watch.svg 1 2 18 19 32 33
"""

import re
import sys
from html import escape
from pathlib import Path

CELL, LINE, MARGIN = 11, 22, 14  # pixels: the width of a character, the height of a line
COLOURED = re.compile(r"\033\[30;48;5;(\d+)m(.)\033\[0m")


def hex_of(index: int) -> str:
    """A colour of the terminal's 6 x 6 x 6 cube."""
    steps = (0, 95, 135, 175, 215, 255)
    index -= 16
    return "#" + "".join(f"{steps[i]:02x}" for i in (index // 36, index // 6 % 6, index % 6))


def draw(line: str, y: int) -> list[str]:
    """One line of the terminal as SVG elements."""
    elements, x = [], MARGIN
    for part in re.split(r"(\033\[30;48;5;\d+m.\033\[0m)", line):
        if match := COLOURED.fullmatch(part):
            part = match[2]
            box = f'x="{x}" y="{y - 16}" width="{CELL - 1}" height="{LINE - 2}"'
            elements.append(f'<rect {box} fill="{hex_of(int(match[1]))}"/>')
        for character in part:
            if character != " ":
                elements.append(f'<text x="{x + CELL / 2}" y="{y}">{escape(character)}</text>')
            x += CELL
    return elements


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    target, wanted = Path(sys.argv[1]), set(sys.argv[2:])
    lines, keep = [], False
    for line in sys.stdin.read().splitlines():
        if line.startswith("Prompt:"):
            break
        first = line.split()[:1]
        if first == ["step"]:
            keep = True
        elif first and first[0].isdecimal():
            keep = first[0] in wanted
        if keep and line:
            lines.append(line)
    width = max(len(COLOURED.sub("x", line)) for line in lines) * CELL + 2 * MARGIN
    height = len(lines) * LINE + 2 * MARGIN
    style = "font: 15px monospace; text-anchor: middle; fill: #1f2328"
    body = [
        element for i, line in enumerate(lines) for element in draw(line, MARGIN + 16 + i * LINE)
    ]
    target.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n<g style="{style}">\n'
        + "\n".join(body)
        + "\n</g>\n</svg>\n"
    )


if __name__ == "__main__":
    main()
