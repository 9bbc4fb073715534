"""What `fit` leaves behind: one whole export, in place of an older one and of nothing else."""

import json

import pytest
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from lit_rlhf import UserError
from tests.callbacks.finished_runs import fit
from tests.stages import STAGES


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_disk_that_fills_up_under_the_weights_leaves_the_older_export_alone(inputs, tmp_path, monkeypatch, error):
    fit(inputs, tmp_path)
    before = weights(tmp_path)

    def full(self, folder, **kwargs):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        fit(inputs, tmp_path)
    assert weights(tmp_path) == before
    assert not list(tmp_path.glob(".model*"))


@pytest.mark.parametrize("folder", [".", "..", "notes"])
def test_what_is_no_export_is_never_replaced(inputs, tmp_path, folder):
    root = tmp_path / "run"
    for place in (root, root / "notes"):
        place.mkdir()
        (place / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and no export of a model; name a folder of its own"):
        fit(inputs, root, export=folder)
    assert (root / "precious.txt").exists() and (root / "notes" / "precious.txt").exists()
    assert not (root / "end.ckpt").exists(), "refused before training"


def test_a_trial_of_one_batch_leaves_export_and_summary_of_the_real_run(inputs, tmp_path):
    fit(inputs, tmp_path)
    before = weights(tmp_path), (tmp_path / "summary.json").read_text()
    fit(inputs, tmp_path, fast_dev_run=True)
    assert (weights(tmp_path), (tmp_path / "summary.json").read_text()) == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("stage", "options"),
    [*((stage, {"limit_val_batches": 0}) for stage in STAGES), ("reward_model", {"max_epochs": -1, "max_steps": 2})],
)
def test_a_finished_run_is_exported_again_from_its_checkpoint(inputs, tmp_path, stage, options):
    fit(inputs, tmp_path, stage, **options)
    before = weights(tmp_path), json.loads((tmp_path / "model" / "config.json").read_text())
    summary = (tmp_path / "summary.json").read_text()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    fit(inputs, tmp_path, stage, ckpt_path=tmp_path / "end.ckpt", **options)
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert weights(tmp_path) == before[0]
    assert after.get("score_bias") == before[1].get("score_bias")
    assert (tmp_path / "summary.json").read_text() == summary, "nothing was trained, so nothing is to tell"
    if stage == "sft":
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")
