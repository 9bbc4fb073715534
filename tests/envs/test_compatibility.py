"""The compatibility table of the docs is the one that `make compatibility` wrote for these tests."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest
from compatibility import MARKED, ORDER, written

ROOT = Path(__file__).parents[2]


def test_the_table_has_a_row_for_every_marker_with_all_its_tests_passed(request):
    for package in ORDER[:-1]:
        pytest.importorskip(package, reason="needs the extra `agents`")
    tests = request.config.stash[MARKED]
    here = {path for path in Path(__file__).parent.glob("test_*.py") if "\n@pytest.mark.plays(" in path.read_text()}
    if here - {Path(__file__).with_name("test_rllib.py")} - {path for path, _ in tests}:
        pytest.skip("the markers are those of the tests that are collected with it: run tests/envs")
    rows = {(row.package, row.what, row.on, row.tests) for row in written() if row.package != "ray"}
    markers = Counter(marker for _, marker in tests if marker[0] != "ray")
    assert rows == {(*marker, f"{n} of {n} pass") for marker, n in markers.items()}


def test_the_rows_of_rllib_are_those_of_its_markers():
    # RLlib is in an environment of its own, so that its file is read here and not collected.
    expected = set()
    for function in ast.parse((Path(__file__).parent / "test_rllib.py").read_text()).body:
        marks = {ast.unparse(mark.func): mark.args for mark in getattr(function, "decorator_list", [])}
        if "pytest.mark.plays" in marks:
            package, what, on = map(ast.literal_eval, marks["pytest.mark.plays"])
            tests = (
                len(ast.literal_eval(marks["pytest.mark.parametrize"][1])) if "pytest.mark.parametrize" in marks else 1
            )
            expected.add((package, what, on, f"{tests} of {tests} pass"))
    rows = {(row.package, row.what, row.on, row.tests) for row in written() if row.package == "ray"}
    assert rows == expected and expected


def test_the_table_was_written_with_the_versions_that_development_installs():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for row in written():
        assert row.version == pins[row.package], row
        if row.package != "ray":  # in an environment of its own, with the Gymnasium that it pins
            assert row.gymnasium == pins["gymnasium"], row
