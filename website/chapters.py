"""Chapters of the course: pages whose Python blocks run one after the other, as the cells of a notebook do.

A block that says `text` right after a cell is what the cell prints: `make course` writes it, and the figures that cells
save, and a test holds each page to what its cells print.
"""

import contextlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

COURSE = Path(__file__).parents[1] / "docs" / "course"
STYLE = COURSE / "figures" / "matplotlibrc"
CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n^```text\n(?P<output>.*?)^```\n)?", re.M | re.S)


class Cell(NamedTuple):
    """A Python block of a page, what it should print, and where both stand."""

    code: str
    output: str
    start: int
    end: int


def pages() -> list[Path]:
    """The chapters, in order."""
    return sorted(path for path in COURSE.glob("*.md") if path.name != "index.md")


def cells(page: str) -> Iterator[Cell]:
    """The cells of a page."""
    for found in CELL.finditer(page):
        yield Cell(found["code"], found["output"] or "", found.start(), found.end())


def printed(codes: list[str], name: str = "chapter") -> Iterator[str]:
    """What each cell prints when all run one after the other, in one namespace and the current folder."""
    names: dict[str, Any] = {"__name__": name}
    for number, code in enumerate(codes):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile(code, f"{name}, cell {number + 1}", "exec"), names)
        yield "".join(line.rstrip() + "\n" for line in said.getvalue().splitlines())


def rewritten(page: str, name: str = "chapter") -> str:
    """A page with what its cells print now; figures are saved into the current folder's `figures/`."""
    found = list(cells(page))
    for cell, output in reversed(list(zip(found, printed([cell.code for cell in found], name), strict=True))):
        text = f"```python\n{cell.code}```\n" + (f"\n```text\n{output}```\n" if output else "")
        page = page[: cell.start] + text + page[cell.end :]
    return page


def main() -> None:
    """Run every chapter, and write what it prints and draws."""
    os.environ["MPLBACKEND"] = "Agg"
    os.environ["MATPLOTLIBRC"] = str(STYLE)
    os.chdir(COURSE)
    for page in pages():
        page.write_text(rewritten(page.read_text(), page.stem))
        print(page.relative_to(COURSE.parents[1]))


if __name__ == "__main__":
    main()
