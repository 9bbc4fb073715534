import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CHECK = """
import lit_rlhf, token_mdp, lit_rlhf.demo, lit_rlhf.demo.__main__ as demo, gymnasium
assert lit_rlhf.__file__.startswith({folder!r}), lit_rlhf.__file__
assert token_mdp.__file__.startswith({folder!r}), token_mdp.__file__
assert (demo.CONFIGS / "sft.yaml").exists() and str(demo.CONFIGS).startswith({folder!r}), demo.CONFIGS
lit_rlhf.SFT("demo", from_scratch=True)
gymnasium.make("LitRLHF/Token-v0").reset(seed=0)
"""


def run(*command, folder):
    """Outside of the checkout, with nothing that leads into it."""
    environment = {"PATH": "", "HOME": str(folder)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_built_wheel_installs_and_works_outside_of_the_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs the dev extra")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, ROOT, folder=tmp_path)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        names = set(archive.namelist())
    assert {"lit_rlhf/py.typed", "token_mdp/py.typed"} <= names  # the annotations are for users' type checkers too
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lit_rlhf", "token_mdp"}

    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", "--no-index", "--no-compile", built, folder=tmp_path)
    # The dependencies are those of this environment; its own .pth files, and with them the checkout, are not read.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    run(python, "-c", CHECK.format(folder=str(site)), folder=tmp_path)
    shown = run(python.with_name("lit-rlhf"), "--help", folder=tmp_path)
    assert all(subcommand in shown for subcommand in ("fit", "validate", "test", "predict", "compare"))
