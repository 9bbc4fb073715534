"""The tables of docs/reliability.md, which the command fills in row by row."""

from collections import Counter
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
FAULTS = ("lost", "corrupt", "hung", "other bits", "left", "untold")


def counted(trials: list[list[str]]) -> Counter[str]:
    """How many trials had faults of each kind; each begins with its kind and a colon."""
    return Counter(kind for wrong in trials for kind in {fault.partition(":")[0] for fault in wrong})


def cells(what: str, number: int, trials: list[list[str]]) -> list[str]:
    """A row: what was done, how often, and how many trials had a fault of each kind."""
    counts = counted(trials)
    return [what, str(number), *(str(counts[fault]) for fault in FAULTS)]


def fill(table: str, rows: list[list[str]]) -> None:
    """Replace rows of a table of the page by their first cell; a new one goes to the end."""
    text = PAGE.read_text()
    start, end = f"<!-- {table} -->\n", f"<!-- end of {table} -->"
    before, rest = text.split(start)
    inside, after = rest.split(end)
    lines = inside.strip().splitlines()
    known = {line.split("|")[1].strip(): line for line in lines[2:]}
    known |= {row[0]: f"| {' | '.join(row)} |" for row in rows}
    PAGE.write_text(before + start + "\n".join([*lines[:2], *known.values()]) + "\n" + end + after)
