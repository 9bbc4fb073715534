"""The compatibility table of the docs is the one that `make compatibility` wrote for these tests."""

import re
from pathlib import Path

from compatibility import marked, written

ROOT = Path(__file__).parents[2]


def test_the_table_has_a_row_for_every_marked_test_and_no_other():
    assert {(row.package, row.what) for row in written()} == marked()


def test_all_tests_behind_the_table_passed_when_it_was_written():
    for row in written():
        passed, total = re.fullmatch(r"(\d+) of (\d+) pass", row.tests).groups()
        assert passed == total != "0", row


def test_the_table_was_written_with_the_versions_that_development_installs():
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for row in written():
        if row.package != "ray":  # in an environment of its own
            assert (row.version, row.gymnasium) == (pins[row.package], pins["gymnasium"]), row
