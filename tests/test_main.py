"""`python -m lit_rlhf` and the script of that name."""

import signal
import subprocess
import sys
import tomllib
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import pytest

from lit_rlhf.__main__ import start


def test_the_version_is_told_without_reading_torch():
    command = [sys.executable, "-X", "importtime", "-m", "lit_rlhf", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"lit-rlhf {version('lit-rlhf')}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers", "datasets", "numpy"}


@pytest.mark.parametrize(
    ("typed", "status", "words"),
    [
        (["--help"], 0, "export    Write the model that a checkpoint holds as a Hugging Face folder.\n"),
        (["-h"], 0, "fit       Train the "),
        (["fit", "--help"], 0, "usage: lit-rlhf fit --config X.yaml "),
        ([], 2, "error: no command is given; write lit-rlhf and one of fit, "),
        (["export", "--ckpt_path=gone.ckpt"], 2, "error: ckpt_path: there is no checkpoint "),
        (["fit", "--ckpt_path", "gone.ckpt"], 2, "error: ckpt_path: there is no checkpoint "),
        (["comprae"], 2, "error: there is no command 'comprae'; did you mean compare?\n"),
    ],
)
def test_the_commands_are_told_before_libraries_are_read(typed, status, words, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lit_rlhf.cli.main", None)  # which reads them
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", *typed])
    with nullcontext() if status == 0 else pytest.raises(SystemExit, match=str(status)):
        start()
    said = "".join(capsys.readouterr())
    assert words in said
    assert status or all(len(line) <= 80 for line in said.splitlines())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_libraries_are_read_ends_in_a_line_and_with_its_status(number, tmp_path):
    slow = "import os, signal, sys; sys.modules['lit_rlhf.cli.main'] = None\nfrom lit_rlhf import __main__ as m\n"
    slow += "sys.argv = ['lit-rlhf', 'fit']\nclass Reading:\n"
    slow += (
        f"    def find_spec(self, name, *rest): name != 'lit_rlhf.cli.main' or os.kill(os.getpid(), {int(number)})\n"
    )
    slow += "del sys.modules['lit_rlhf.cli.main']; sys.meta_path.insert(0, Reading()); m.start()"
    done = subprocess.run([sys.executable, "-c", slow], capture_output=True, text=True)
    assert done.returncode == 128 + number
    assert done.stderr == f"{number.name} ended the program before its work began\n"


@pytest.mark.parametrize(
    "name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_LOCALID", "MASTER_PORT", "JSM_NAMESPACE_RANK"]
)
def test_a_rank_that_is_no_number_is_told_before_anything_is_read(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "x")
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", "fit"])
    with pytest.raises(SystemExit) as exit:
        start()
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: the environment variable {name} ('x') must be a whole number; unset it\n"


def test_the_script_is_the_module():
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["lit-rlhf"] == f"{start.__module__}:{start.__name__}"
