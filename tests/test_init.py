"""The public names are there when they are asked for, and nothing is read before."""

import ast
import inspect
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import lit_rlhf


@pytest.mark.parametrize("name", lit_rlhf.__all__)
def test_a_public_name_is_what_its_file_defines(name):
    found = getattr(lit_rlhf, name)
    assert found is getattr(import_module(f"lit_rlhf.{lit_rlhf.HOMES[name]}"), name)
    assert found.__module__ == f"lit_rlhf.{lit_rlhf.HOMES[name]}"
    assert name in dir(lit_rlhf)


def test_type_checkers_see_the_same_names_from_the_same_files():
    tree = ast.parse(inspect.getsource(lit_rlhf))
    seen = {a.name: n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
    seen = {name: module.removeprefix("lit_rlhf.") for name, module in seen.items() if module.startswith("lit_rlhf.")}
    assert seen == lit_rlhf.HOMES
    assert sorted(lit_rlhf.HOMES) == sorted(lit_rlhf.__all__)


def test_any_other_name_is_none():
    with pytest.raises(AttributeError, match="module 'lit_rlhf' has no attribute 'SFTT'"):
        lit_rlhf.SFTT  # noqa: B018


def test_the_version_stands_in_one_place():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert lit_rlhf.__version__ == project["version"]
    assert "version" not in yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text())
