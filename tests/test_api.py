"""docs/api.md lists the public names, all of them and no others."""

import importlib
import re

import pytest

from tests.api_page import ALIASES, PACKAGES, PAGE, page


def listed():
    """The names that the page has under each package."""
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.M)[1:]
    return {
        package: re.findall(r"^- `(\w+)`", text, re.M) for package, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.mark.parametrize("package", PACKAGES)
def test_the_page_lists_what_a_package_exports_and_nothing_else(package):
    names = listed()[package]
    assert sorted(names) == sorted(importlib.import_module(package).__all__), "run make api"


def test_each_line_is_the_first_of_the_docstring_under_its_room():
    assert PAGE.read_text() == page(), "run make api"


def test_an_alias_is_described_only_where_the_name_has_no_docstring_of_its_own():
    for name in ALIASES:
        (package,) = (package for package in PACKAGES if name in importlib.import_module(package).__all__)
        assert not isinstance(getattr(importlib.import_module(package), name), type)
