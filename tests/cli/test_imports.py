"""A module of the user's that fails while it is imported is told with what failed in it, and where."""

import sys
from pathlib import Path

import pytest

from lit_rlhf.cli.imports import failed_import
from tests.cli.command_line import run

MODULES = {  # what a module holds -> what is said of it
    "def f(prompts, responses)\n    return 1\n": "cannot be imported: expected ':', in ",
    "\nraise RuntimeError('set MY_KEY\\nfirst')\n": "cannot be imported: RuntimeError: set MY_KEY first, in ",
    "import no_such_package\ndef f(p, r): return r\n": "needs the module no_such_package, which is not installed, in ",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a name of its own that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(content):
        names.append(f"{tmp_path.name.replace('-', '_')}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(content)
        return names[-1]

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("content", MODULES, ids=lambda content: MODULES[content][:30])
def test_what_fails_in_a_module_is_told_with_its_place(content, module):
    name = module(content)
    assert failed_import(f"{{'function': '{name}.f'}}").startswith(f"{name} {MODULES[content]}")


def test_modules_that_are_whole_and_paths_that_are_none_are_no_fault(module):
    name = module("def f(): pass\n")
    for value in (f"{name}.f", f"{name}.g", "no_such_module.f", "json.dumps", "0.5", "runs/sft/model", "a.jsonl"):
        assert failed_import(value) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["--data.reward={}", "--data.reward.function={}"])
def test_a_reward_whose_module_fails_is_told_by_option_and_cause(by, module, capsys):
    name = module("raise RuntimeError('set MY_KEY first')\n")
    options = ["--data.reward=lit_rlhf.TextReward"] if "function" in by else []
    assert run("fit", "--config", "configs/ppo.yaml", *options, by.format(f"{name}.f")) == 2
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"error: {by.partition('=')[0]}: {name} cannot be imported: RuntimeError: set MY_KEY first")
    assert said.endswith(f"{name}.py:1")


@pytest.mark.filterwarnings("ignore")
def test_a_file_in_place_of_an_import_path_is_told_as_such(tmp_path, monkeypatch, capsys):
    config = Path("configs/ppo.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    Path("score.py").write_text("def f(prompts, responses): return [0.0] * len(responses)\n")
    assert run("fit", "--config", config, "--data.reward=./score.py") == 2
    told = "error: --data.reward: expected an import path, such as score.score, got the file ./score.py"
    assert capsys.readouterr().err.splitlines()[0] == told


@pytest.mark.filterwarnings("ignore")
def test_a_script_that_ends_the_program_while_it_is_imported_is_named(module, capsys):
    name = module("import sys\nsys.exit('usage: score FILE')\n")
    assert run("fit", "--config", "configs/ppo.yaml", f"--data.reward={name}.f") == 2
    assert f"{name}.py:2 ends the program while it is imported (usage: score FILE)" in capsys.readouterr().err
