import json

import pytest

from tests.callbacks.finished_runs import fit


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_a_run_killed_before_its_summary_has_it_written_when_it_goes_on(inputs, tmp_path):
    fit(inputs, tmp_path)
    before = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").unlink()
    fit(inputs, tmp_path, ckpt_path=tmp_path / "end.ckpt")
    after = json.loads((tmp_path / "summary.json").read_text())
    assert (after["metrics"], after["steps"]) == (before["metrics"], before["steps"])
    assert "val/loss" in after["metrics"]


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_the_time_of_a_resumed_run_is_that_of_all_its_parts(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.callbacks.summary.time.perf_counter", iter(range(0, 10**6, 100)).__next__)
    fit(inputs, tmp_path)
    first = json.loads((tmp_path / "summary.json").read_text())["seconds"]
    fit(inputs, tmp_path, ckpt_path=tmp_path / "end.ckpt", max_epochs=2)
    assert json.loads((tmp_path / "summary.json").read_text())["seconds"] > first
