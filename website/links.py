"""Links of Markdown pages, and the lines of code that they lead to."""

import re
from collections.abc import Iterator
from pathlib import Path

LINK = re.compile(r"(?P<mark>!?)\[(?P<text>(?:[^\[\]]|\[[^\[\]]*\])*)\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^(?P<fence>`{3,})[^`].*?^(?P=fence)`*$", re.M | re.S)


def outside_fences(markdown: str) -> Iterator[str]:
    """The paragraphs of a page that are not in fenced code, each as it stands."""
    for part in FENCE.sub("\0", markdown).split("\0"):
        yield from (paragraph for paragraph in part.split("\n\n") if paragraph.strip())


def line_of(path: Path, text: str) -> int | None:
    """The number, from 1, of the line that a link's text in code font names: a definition, or the code itself.

    None where the text is not in code font or tells no line, or several.
    """
    if not (code := re.fullmatch(r"`+ ?(.*?) ?`+", text.replace("\n", " "))):
        return None
    lines = path.read_text().splitlines()
    name = re.escape(code[1].split("(")[0].split(".")[-1])
    defined = [
        number for number, line in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name}\b|{name}\b.* = ", line)
    ]
    found = defined or [number for number, line in enumerate(lines, 1) if code[1] in line]
    return found[0] if defined or len(found) == 1 else None
