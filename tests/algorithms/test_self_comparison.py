"""A policy that is measured against itself is told so, and of an export what its run started from."""

import shutil
import warnings
from pathlib import Path

import pytest
import torch

from lit_rlhf import DPO
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.self_comparison import same_weights, start_of
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.models.adapters import LoRA
from tests.stages import make_stage, make_trainer

ITSELF = "is measured against itself"


def told(run, module: AlignmentModule, data) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(module, data, verbose=False)
    return [str(one.message) for one in caught if ITSELF in str(one.message)]


@pytest.mark.parametrize("stage", ["dpo", "kto", "ppo"])
def test_validation_of_a_policy_without_another_reference_is_told_to_be_against_itself(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    (line,) = told(trainer.validate, module, data)
    assert "model.reference is null" in line and line.endswith("--model.reference=FOLDER")
    other, data = make_stage(stage, inputs, reference=str(inputs / "teacher"))
    assert told(make_trainer(tmp_path, limit_val_batches=1).validate, other, data) == []


@pytest.mark.parametrize("options", [{"lora": LoRA()}, {"cache_reference": True}])
def test_adapters_and_a_cached_reference_are_the_policy_itself_too(options, inputs, tmp_path):
    module, data = make_stage("dpo", inputs, **options)
    assert len(told(make_trainer(tmp_path, limit_val_batches=1).validate, module, data)) == 1


@pytest.mark.parametrize("stage", ["sft", "simpo", "distillation"])
def test_stages_that_compare_with_nothing_or_with_a_teacher_say_nothing(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    assert told(make_trainer(tmp_path, limit_val_batches=1).validate, module, data) == []


def test_without_a_reference_nothing_is_told(inputs, tmp_path):
    module, data = make_stage("dpo", inputs, reference_free=True)
    assert told(make_trainer(tmp_path, limit_val_batches=1).validate, module, data) == []


def test_a_run_and_what_it_has_learnt_are_not_measured_against_themselves(inputs, tmp_path):
    module, data = make_stage("dpo", inputs)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{ITSELF}")
        trainer.fit(module, data)
    assert told(trainer.validate, module, data) == []
    file = tmp_path / "one.ckpt"
    trainer.save_checkpoint(file)
    fresh, data = make_stage("dpo", inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=f".*{ITSELF}")
        make_trainer(tmp_path, limit_val_batches=1).validate(fresh, data, ckpt_path=str(file), verbose=False)


def test_an_export_is_told_by_its_card_what_its_run_started_from(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(inputs)
    module, data = make_stage("dpo", Path())
    make_trainer(tmp_path, max_steps=1, callbacks=[HuggingFaceExport(str(tmp_path / "out"))]).fit(module, data)
    trained, (_, data) = DPO(str(tmp_path / "out")), make_stage("dpo", inputs)
    (line,) = told(make_trainer(tmp_path, limit_val_batches=1).validate, trained, data)
    assert line.endswith("--model.reference=model (by its model card)")
    assert start_of(str(tmp_path / "out"), "PPO") == ""  # the run of another stage
    (tmp_path / "out" / "README.md").write_text("of another library")
    assert start_of(str(tmp_path / "out"), "DPO") == ""


def test_weights_are_the_same_wherever_they_lie(inputs, tmp_path):
    copied = shutil.copytree(inputs / "model", tmp_path / "copied")
    assert same_weights(str(inputs / "model"), str(copied))
    assert not same_weights(str(inputs / "model"), str(inputs / "teacher"))


def test_a_reference_with_the_weights_of_the_policy_is_named(inputs, tmp_path):
    copied = str(shutil.copytree(inputs / "model", tmp_path / "copied"))
    module, data = make_stage("dpo", inputs, reference=copied)
    trainer = make_trainer(tmp_path, limit_test_batches=1, limit_val_batches=1)
    (line,) = told(trainer.validate, module, data)
    assert f"model.reference ({copied}) holds the same weights" in line
    assert trainer.callback_metrics["val/loss"] == pytest.approx(torch.tensor(2.0).log().item())
