"""Run the tests in which a package plays the token environment, and write the table of docs/token_mdp.md.

    make compatibility
    make rllib

A row stands for the tests that carry the same marker `plays(package, what, on)`. RLlib runs in an environment of its
own, where `python tests/envs/compatibility.py ray` rewrites its rows and no others.
"""

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "token_mdp.md"
BEGIN, END = "<!-- written by `make compatibility` -->\n", "<!-- end -->"
HEADER = "| Package | Version | Gymnasium | What | On | Tests |\n|---|---|---|---|---|---|\n"
MARKED = pytest.StashKey[
    list
]()  # of a run of pytest: the tests that have a marker, each file with the marker's arguments
ORDER = ("gymnasium", "stable_baselines3", "sb3_contrib", "torchrl", "tianshou", "ray")


class Row(NamedTuple):
    """A line of the table."""

    package: str
    version: str
    gymnasium: str
    what: str
    on: str
    tests: str


class Recorder:
    """Pytest plugin that runs the marked tests of some packages and keeps their outcomes."""

    def __init__(self, packages):
        self.packages = packages
        self.marks = {}  # test → its marker's arguments
        self.outcomes = {}  # a marker's arguments → whether its tests passed

    def pytest_collection_modifyitems(self, items):
        for item in items:
            mark = item.get_closest_marker("plays")
            if mark is not None and mark.args[0] in self.packages:
                self.marks[item.nodeid] = mark.args
        items[:] = [item for item in items if item.nodeid in self.marks]

    def pytest_runtest_logreport(self, report):
        if report.nodeid in self.marks and (report.when == "call" or report.failed) and not report.skipped:
            self.outcomes.setdefault(self.marks[report.nodeid], []).append(report.passed)

    def rows(self):
        """A row per marker."""
        return [
            Row(package, version(package), version("gymnasium"), what, on, f"{sum(passed)} of {len(passed)} pass")
            for (package, what, on), passed in self.outcomes.items()
        ]


def written() -> list[Row]:
    """The rows that the page holds."""
    lines = PAGE.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    return [Row(*line.strip("| ").split(" | ")) for line in lines]


def main(packages: list[str]) -> int:
    """Rewrite the rows of these packages, or of all but RLlib's."""
    packages = packages or [package for package in ORDER if package != "ray"]
    recorder = Recorder(packages)
    status = pytest.main([str(FOLDER), "-q", "-m", "not gpu"], plugins=[recorder])
    rows = [row for row in written() if row.package not in packages] + recorder.rows()
    rows.sort(key=lambda row: (ORDER.index(row.package), row.what.lower()))
    before, rest = PAGE.read_text().split(BEGIN)
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    PAGE.write_text(before + BEGIN + HEADER + lines + END + rest.split(END)[1])
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
