"""The short help of a run names what there is, and says how to see the rest."""

import re

import pytest
from lightning.pytorch import LightningDataModule

import lit_rlhf
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.cli.commands import RUNS
from lit_rlhf.cli.run_help import run_help
from tests.cli.command_line import run

TOLD = run_help(["fit", "--help"])
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")


@pytest.mark.parametrize("name", RUNS)
def test_the_help_of_a_run_fits_a_screen_of_eighty_columns(name):
    told = run_help([name, "--config", "x.yaml", "-h"])
    assert f"usage: lit-rlhf {name} " in told and RUNS[name] in told
    assert len(told.splitlines()) < 60 and max(map(len, told.splitlines())) <= 80


def test_other_command_lines_are_not_answered():
    assert run_help([]) is run_help(["fit"]) is run_help(["plan", "--help"]) is None
    assert run_help(["fit", "--model.help", "lit_rlhf.DPO"]) is None


def test_it_names_every_method_and_kind_of_data():
    public = {name: getattr(lit_rlhf, name) for name in lit_rlhf.__all__}
    for name, kind in public.items():
        if isinstance(kind, type) and issubclass(kind, AlignmentModule | LightningDataModule):
            assert re.search(rf"\b{name}\b", TOLD), name


def test_it_names_every_option_but_those_of_classes_and_most_of_the_trainers(capsys):
    assert run("fit", "--help") == 0  # all of them, from the parser
    there = set(re.findall(r"^  (?:-c \w+, )?--(\w[\w.]*)", capsys.readouterr().out, re.M))
    asked = {name for name in there if not name.startswith(("trainer.", "data.", "model.")) and "help" not in name}
    assert {"config", "ckpt_path", "export.dtype", "samples.page", "predictions.keep"} < asked
    for name in asked:
        section, _, last = name.rpartition(".")
        part = TOLD.partition(f"--{section}." if section else "--")[2]
        assert last in re.findall(r"\w+", part.partition("--")[0] if section else part), name
    named = re.findall(r"--(trainer\.\w+)", TOLD)
    assert len(named) > 5 and set(named) <= there


def test_a_config_is_printed_with_what_its_options_mean(capsys):
    assert run("fit", "--config", "configs/dpo.yaml", "--print_config=comments") == 0
    told = capsys.readouterr().out
    assert re.search(r"# strength of the pull towards the reference[^\n]*(\n *#[^\n]*)*\n *beta: 0\.5", told)
