"""docs/api.md lists the public names, all of them and no others."""

import importlib
import re

import pytest

from tests.api_page import ALIASES, PACKAGES, PAGE, page

ROOT = PAGE.parents[1]


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


def test_whatever_a_yaml_of_configs_and_docs_names_is_public():
    blocks = [re.findall(r"```yaml\n(.*?)```", file.read_text(), re.S) for file in ROOT.glob("docs/*.md")]
    yamls = [file.read_text() for file in ROOT.glob("configs/**/*.yaml")] + [text for page in blocks for text in page]
    named = {path for text in yamls for path in re.findall(r"\b(?:lit_rlhf|token_mdp)\.[\w.]*\w", text)}
    assert {"lit_rlhf.PPO", "lit_rlhf.demo.gold_reward", "token_mdp.verifiable.ExactAnswer"} <= named
    assert named <= {f"{package}.{name}" for package, names in listed().items() for name in names}
