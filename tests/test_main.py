"""`python -m lit_rlhf` and the script of that name."""

import subprocess
import sys
import tomllib
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
