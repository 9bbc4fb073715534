"""A little of the torture in every test run, and that it would see what it looks for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_rlhf.files import NEW
from tests.torture import page
from tests.torture.moments import changed, kind_of
from tests.torture.remains import bits, faults, hash_of, leftovers

ROOT = Path(__file__).parents[2]
CHECKPOINT = {
    "state_dict": {"w": torch.ones(9)},
    "loops": {"fit_loop": {"state_dict": {}}},
    "pytorch-lightning_version": "2.6",
    "global_step": 4,
}
OPTIMIZER = {"state": {0: {"step": torch.ones(())}}, "param_groups": []}
CHECKPOINT |= {"optimizer_states": [OPTIMIZER], "lr_schedulers": [{"last_epoch": 4}], "callbacks": {}, "epoch": 1}


def test_a_killed_run_goes_on_to_the_bits_of_a_run_never_killed():
    command = [sys.executable, "-m", "tests.torture", "kills", "--stages", "SFT", "--kills", "1", "--dry"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/envs"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout.count(": right") == 1


@pytest.fixture
def left(tmp_path):
    """What a run leaves."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    torch.save(CHECKPOINT, run / "step=4.ckpt")
    save_file({"w": torch.ones(9)}, run / "model" / "model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (run / "model" / name).write_text("{}")
    (run / "summary.json").write_text(json.dumps({"steps": 4, "metrics": {"val/loss": 0.5, "perf/mfu": 0.1}}))
    assert faults(tmp_path) == leftovers(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize("name", ["step=4.ckpt", "model/model.safetensors", "model/config.json", "summary.json"])
def test_a_file_that_was_cut_short_is_a_fault(left, name):
    file = left / "run" / name
    file.write_bytes(file.read_bytes()[:-1])
    (fault,) = faults(left)
    assert fault.startswith(f"run/{name}: ")


def test_a_part_of_an_export_that_is_missing_is_a_fault_and_a_write_under_way_is_left(left):
    (left / "run" / "model" / "tokenizer.json").unlink()
    assert len(faults(left)) == 1
    (left / "run" / f".model{NEW}").mkdir()
    assert leftovers(left) == [f"run/.model{NEW}"]


def test_bits_are_of_all_that_a_run_comes_to_but_its_speed(left):
    before = bits(left)
    summary = json.loads((left / "run" / "summary.json").read_text())
    summary["metrics"]["perf/mfu"] = 0.2
    (left / "run" / "summary.json").write_text(json.dumps(summary))
    assert bits(left) == before
    torch.save(CHECKPOINT | {"optimizer_states": [{"moment": torch.zeros(1)}]}, left / "run" / "step=4.ckpt")
    assert {name for name, value in bits(left).items() if before[name] != value} == {"optimizer_states"}
    assert hash_of(torch.tensor([0.0])) != hash_of(torch.tensor([-0.0]))


def test_changes_are_told_from_looks_and_by_what_they_belong_to():
    assert changed("open", ("a", "r", os.O_RDONLY)) is None and changed("open", ("a", "w", os.O_WRONLY)) == "a"
    assert changed("os.rename", ("a", "b", -1, -1)) == "a" and changed("os.listdir", ("a",)) is None
    assert [kind_of(f"/x/{path}") for path in ("run/v/.step=1.ckpt.new", "run/model", "cache/tokens/a", "run/e")] == [
        "checkpoint",
        "export",
        "token cache",
        "logs and summary",
    ]


def test_a_row_of_the_page_takes_the_place_of_the_one_of_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(
        "Before.\n<!-- counts -->\n| what | times |\n| --- | --- |\n| a | 1 |\n<!-- end of counts -->\n"
    )
    page.fill("counts", [["b", "2"]])
    page.fill("counts", [["a", "3"]])
    assert "| --- | --- |\n| a | 3 |\n| b | 2 |\n<!-- end" in page.PAGE.read_text()
    trials = [["lost: x", "lost: y", "left: z"], [], ["filled: "]]
    assert page.cells("a", 3, trials) == ["a", "3", "1", "0", "0", "0", "1", "0"]
