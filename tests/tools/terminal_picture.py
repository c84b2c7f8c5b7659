"""A terminal session as an SVG picture, for the page on a run.

    make train; (echo "$ make train"; cat outputs/*/train.log) > train.txt
    python tests/tools/terminal_picture.py train.txt rsotrain/running/make_train.svg

Keeps the first and the last lines of the text and marks what is left out between them.
"""

import argparse
import io
from pathlib import Path

from rich.console import Console
from rich.text import Text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("svg", type=Path)
    parser.add_argument("--title", default="make train")
    parser.add_argument("--head", type=int, default=20)
    parser.add_argument("--tail", type=int, default=26)
    parser.add_argument("--width", type=int, default=106)
    arguments = parser.parse_args()
    lines = arguments.text.read_text().splitlines()
    if len(lines) > arguments.head + arguments.tail:
        lines = [*lines[: arguments.head], "…", *lines[-arguments.tail :]]
    console = Console(record=True, width=arguments.width, file=io.StringIO())
    for line in lines:
        console.print(Text(line.rstrip()), soft_wrap=True)
    arguments.svg.parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(str(arguments.svg), title=arguments.title)


if __name__ == "__main__":
    main()
