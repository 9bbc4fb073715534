"""`python -m lit_rlhf` and the script of that name."""

import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from lit_rlhf.__main__ import start


def test_the_version_is_told_without_reading_torch():
    command = [sys.executable, "-X", "importtime", "-m", "lit_rlhf", "--version"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == f"lit-rlhf {version('lit-rlhf')}\n"
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not imported & {"torch", "lightning", "transformers", "datasets", "numpy"}


def test_the_script_is_the_module():
    scripts = tomllib.loads(Path("pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["lit-rlhf"] == f"{start.__module__}:{start.__name__}"
