"""`make audit` tells licences that ask for more, and does not take an audit that was not made for a good one."""

import json

import pytest

from tests.audit import all_needed, holes_told, licence, refused


def test_what_lit_rlhf_needs_asks_for_no_more_than_its_notice():
    packages = all_needed("lit-rlhf")
    assert {"torch", "tokenizers", "werkzeug"} <= packages and "ray" not in packages
    licences = {package: said for package in packages if (said := licence(package)) is not None}
    assert len(licences) > 30 and refused(licences) == []


@pytest.mark.parametrize("said", ["GPL-3.0-only", "GNU Affero General Public License", "MIT AND LGPL-2.1", "", "Own"])
def test_a_licence_that_asks_for_more_or_is_not_named_is_told(said):
    assert refused({"it": said, "other": "BSD 3-Clause License"}) == [f"it: {said or 'no licence is named'}"]


def test_nvidias_own_terms_are_no_hindrance_to_it():
    assert refused({"nvidia-cudnn-cu13": "LicenseRef-NVIDIA-Proprietary", "cuda-toolkit": ""}) == []
    assert refused({"nvidian": "Own"}) == ["nvidian: Own"]


def answer(**packages):
    """As pip-audit has it in JSON."""
    return json.dumps({"dependencies": [{"name": name} | about for name, about in packages.items()], "fixes": []})


HOLE = {"version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["1.1"]}]}


@pytest.mark.parametrize(
    ("said", "complaint", "status", "words"),
    [
        (answer(a={"version": "1", "vulns": []}), "", 0, "1 packages looked at, 0 known holes"),
        (answer(a=HOLE, b={"skip_reason": "not on PyPI"}), "Found 1", 1, "a 1.0: PYSEC-1, mended in 1.1"),
        (answer(a={"skip_reason": "not on PyPI"}), "", 2, "known holes were not looked for"),
        ("", "ERROR: Failed to resolve 'pypi.org'", 2, "cannot be reached (ERROR: Failed to resolve"),
        ("", "No module named pip_audit", 2, "pip install pip-audit"),
    ],
)
def test_what_pip_audit_answers_is_told(said, complaint, status, words):
    assert holes_told(said, complaint)[0] == status and words in holes_told(said, complaint)[1]
