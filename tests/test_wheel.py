import subprocess
import sys
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


def test_the_built_wheel_works_outside_of_the_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="building the wheel needs the dev extra")
    wheel = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run([*wheel, str(ROOT)], check=True)
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
        archive.extractall(tmp_path / "site")
    assert {name for name in top if not name.endswith(".dist-info")} == {"lit_rlhf", "token_mdp"}
    code = CHECK.format(folder=str(tmp_path / "site"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
