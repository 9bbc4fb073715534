"""Runs whose folders were trained anew meanwhile: what they stand on and do not hold is known again, or refused."""

import os
import shutil

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import DPO, PPO, SFT, LoRA, ReferenceUpdate, RewardModelReward, UserError
from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.cli.checkpoints import WholeCheckpointIO
from lit_rlhf.cli.export import export
from lit_rlhf.models.adapter_folders import BASE_FILE
from lit_rlhf.models.loading import load_policy, load_scorer
from lit_rlhf.rollout.play import GenerationSettings
from lit_rlhf.rollout.scoring import Rewards
from tests.algorithms.test_lora import fit
from tests.models.test_adapter_folders import pytestmark
from tests.stages import make_stage, make_trainer, write_inputs
from tests.tiny import save_tiny, tiny_model

__all__ = ["pytestmark"]
ADAPTER = LoRA(r=2)
ONE = {"max_epochs": 1}
SHORT = GenerationSettings(max_new_tokens=4)


@pytest.fixture
def inputs(tmp_path):
    """Of one test, since their model is replaced."""
    write_inputs(tmp_path / "inputs", rows=4)
    return tmp_path / "inputs"


def retrain(inputs, seed=1):
    """Other weights in the model's folder, its tokenizer and config as they were."""
    tiny_model(seed=seed).save_pretrained(inputs / "model")


def again(stage, inputs, ckpt_path, reward=None, **options):
    """Go on from a checkpoint at its run's end, in a module made anew."""
    module, data = make_stage(stage, inputs, **options)
    if reward is not None:
        data.rewards = Rewards(RewardModelReward(str(reward)))
    trainer_of(ckpt_path).fit(module, data, ckpt_path=ckpt_path)
    return module


def trainer_of(ckpt_path):
    """One like that of the run."""
    saver = ModelCheckpoint(ckpt_path.parent, filename="last", save_on_train_epoch_end=True)
    options = {"callbacks": [saver], "enable_checkpointing": True, "limit_val_batches": 1}
    return make_trainer(ckpt_path.parent, max_epochs=1, **options)


RUNS = {
    "sft": ("sft", {"lora": ADAPTER}, "policy"),
    "reward_model": ("reward_model", {"lora": ADAPTER}, "reward_model"),
    "dpo": ("dpo", {}, "reference"),
    "dpo_lora": ("dpo", {"lora": ADAPTER}, "policy"),
    "ppo": ("ppo", {}, "reference"),
    "ppo_lora": ("ppo", {"lora": ADAPTER}, "policy"),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_from_a_copied_folder_and_not_from_one_that_was_trained_anew(name, inputs, tmp_path):
    stage, options, role = RUNS[name]
    fit(stage, inputs, tmp_path / "run", trainer=ONE, **options)
    path = tmp_path / "run" / "last.ckpt"
    shutil.copytree(inputs, tmp_path / "copied")
    os.utime(tmp_path / "copied" / "model" / "model.safetensors", (1, 1))
    again(stage, tmp_path / "copied", path, **options)
    retrain(inputs)
    with pytest.raises(UserError, match=rf"ckpt_path: {inputs}/model, which the {role} of its run stood on, holds oth"):
        again(stage, inputs, path, **options)


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        ("sft", {}),
        ("reward_model", {}),
        ("dpo", {"cache_reference": True}),
        ("dpo", {"reference_free": True}),
        ("dpo", {"reference_update": ReferenceUpdate(every=1)}),
    ],
)
def test_a_run_whose_weights_are_all_in_the_checkpoint_goes_on(stage, options, inputs, tmp_path):
    module = fit(stage, inputs, tmp_path / "run", trainer=ONE, **options)
    retrain(inputs)
    resumed = again(stage, inputs, tmp_path / "run" / "last.ckpt", **options)
    assert all(torch.equal(weight, resumed.state_dict()[name]) for name, weight in module.state_dict().items())


def test_a_reference_that_is_named_counts_by_itself(inputs, tmp_path):
    save_tiny(tmp_path / "reference", seed=3)
    for run, options in (("full", {}), ("adapter", {"lora": ADAPTER})):
        options |= {"reference": str(tmp_path / "reference")}
        fit("dpo", inputs, tmp_path / run, trainer=ONE, **options)
        tiny_model(seed=4 + len(options)).save_pretrained(tmp_path / "reference")
        with pytest.raises(UserError, match=rf"{tmp_path}/reference, which the reference of its run stood on"):
            again("dpo", inputs, tmp_path / run / "last.ckpt", **options)


def test_an_adapter_that_goes_on_learning_keeps_its_start_as_reference_and_no_other(inputs, tmp_path):
    fit("sft", inputs, tmp_path / "sft", trainer=ONE, lora=ADAPTER)
    started = shutil.copytree(inputs, tmp_path / "started", ignore=shutil.ignore_patterns("model"))
    shutil.copytree(tmp_path / "sft" / "model", started / "model")
    fit("ppo", started, tmp_path / "run", trainer=ONE)
    shutil.rmtree(started / "model")
    fit("sft", inputs, tmp_path / "other", trainer=ONE, lora=ADAPTER, seed=5)
    shutil.copytree(tmp_path / "other" / "model", started / "model")
    with pytest.raises(UserError, match=rf"{started}/model, which the reference of its run stood on"):
        again("ppo", started, tmp_path / "run" / "last.ckpt")
    module, data = make_stage("ppo", started, generation=SHORT)  # whose reference has no say in what is predicted
    path = tmp_path / "run" / "last.ckpt"
    assert trainer_of(path).predict(module, data, ckpt_path=path)


@pytest.mark.parametrize("cached", [True, False])
def test_a_reference_on_the_policys_base_is_the_same_with_and_without_a_cache_of_it(cached, inputs, tmp_path):
    fit("sft", inputs, tmp_path / "sft", trainer=ONE, lora=ADAPTER)
    started = shutil.copytree(inputs, tmp_path / "started", ignore=shutil.ignore_patterns("model"))
    shutil.copytree(tmp_path / "sft" / "model", started / "model")
    fit("dpo", started, tmp_path / "run", trainer=ONE, cache_reference=cached)
    path, twice = shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "run" / "kept.ckpt"), {"max_epochs": 2}
    ends = [
        fit("dpo", started, tmp_path / "run", trainer=twice, ckpt_path=path, cache_reference=to).state_dict()
        for to in (True, False)
    ]
    assert all(torch.allclose(weight, ends[1][name], atol=1e-6) for name, weight in ends[0].items())
    fit("sft", inputs, tmp_path / "other", trainer=ONE, lora=ADAPTER, seed=5)
    shutil.rmtree(started / "model")
    shutil.copytree(tmp_path / "other" / "model", started / "model")
    for to in (True, False):
        with pytest.raises(UserError, match=rf"{started}/model, which the reference of its run stood on"):
            again("dpo", started, path, cache_reference=to)


@pytest.fixture
def judged(inputs, tmp_path):
    """A checkpoint of PPO, and the folder of the reward model that it learnt by: whole, or an adapter on its base."""

    def run(**options):
        fit("reward_model", inputs, tmp_path / "judge", trainer=ONE, **options)
        module, data = make_stage("ppo", inputs, **options)
        data.rewards = Rewards(RewardModelReward(str(tmp_path / "judge" / "model")))
        saver = ModelCheckpoint(tmp_path / "ppo", filename="last", save_on_train_epoch_end=True)
        make_trainer(tmp_path / "ppo", max_epochs=1, callbacks=[saver], enable_checkpointing=True).fit(module, data)
        return tmp_path / "ppo" / "last.ckpt", tmp_path / "judge" / "model"

    return run


@pytest.mark.parametrize("options", [{}, {"lora": ADAPTER}])
def test_a_reward_model_that_was_trained_anew_is_refused_and_another_one_taken(options, judged, inputs, tmp_path):
    path, judge = judged(**options)
    again("ppo", inputs, path, reward=judge, **options)
    fit("reward_model", inputs, judge.parent, trainer=ONE, seed=7, **options)
    with pytest.raises(UserError, match=rf"ckpt_path: {judge}, which the data.reward of its run stood on, holds other"):
        again("ppo", inputs, path, reward=judge, **options)
    module, data = make_stage("ppo", inputs, generation=SHORT, **options)
    data.rewards = Rewards(RewardModelReward(str(judge)))
    with pytest.raises(UserError, match=r"data\.reward of its run"):
        trainer_of(path).validate(module, data, ckpt_path=path)
    assert trainer_of(path).predict(module, data, ckpt_path=path)
    again("ppo", inputs, path, reward=shutil.copytree(judge, tmp_path / "named"), **options)


def test_a_checkpoint_is_loaded_validated_predicted_and_exported_from_the_weights_it_stood_on(inputs, tmp_path):
    fit("dpo", inputs, tmp_path / "whole", trainer=ONE)
    fit("dpo", inputs, tmp_path / "adapted", trainer=ONE, lora=ADAPTER)
    kept = shutil.copytree(inputs / "model", tmp_path / "kept")
    whole, adapted = (tmp_path / name / "last.ckpt" for name in ("whole", "adapted"))
    DPO.load_from_checkpoint(whole), DPO.load_from_checkpoint(adapted)
    retrain(inputs)
    for path, options, role in ((whole, {}, "reference"), (adapted, {"lora": ADAPTER}, "policy")):
        with pytest.raises(UserError, match=f"which the {role} of its run stood on"):
            DPO.load_from_checkpoint(path)
        module, data = make_stage("dpo", inputs, **options)
        with pytest.raises(UserError, match=f"which the {role} of its run stood on"):
            trainer_of(path).validate(module, data, ckpt_path=path)
    assert DPO.load_from_checkpoint(adapted, policy=str(kept)).policy.origin.base == str(kept)

    export(str(whole), str(tmp_path / "out"))  # takes config and tokenizer alone
    for merge in (True, False):
        with pytest.raises(UserError, match=rf"nothing is exported, since {inputs}/model holds other weights than the"):
            export(str(adapted), str(tmp_path / f"{merge}"), merge=merge)
        assert not (tmp_path / f"{merge}").exists()
        export(str(adapted), str(tmp_path / f"{merge}"), merge=merge, policy=str(kept))


def test_a_run_does_not_export_onto_a_base_that_changed_while_it_learnt(inputs, tmp_path):
    class Meanwhile(HuggingFaceExport):
        def on_fit_end(self, trainer, pl_module):
            retrain(inputs)
            super().on_fit_end(trainer, pl_module)

    module, data = make_stage("sft", inputs, lora=ADAPTER)
    with pytest.raises(UserError, match="nothing is exported, since"):
        make_trainer(tmp_path, max_epochs=1, callbacks=[Meanwhile(merge=True)]).fit(module, data)
    assert not (tmp_path / "model").exists()


def test_an_exported_adapter_is_put_on_the_base_that_it_has_learnt_on_alone(inputs, tmp_path):
    """As a start, as reference, as critic and as reward model; unless it is asked for."""
    fit("sft", inputs, tmp_path / "sft", trainer=ONE, lora=ADAPTER)
    fit("reward_model", inputs, tmp_path / "judge", trainer=ONE, lora=ADAPTER)
    policy, judge = tmp_path / "sft" / "model", tmp_path / "judge" / "model"
    load_policy(policy), load_scorer(judge)
    retrain(inputs)
    refused = {
        "start": lambda: SFT(str(policy)),
        "under another": lambda: SFT(str(policy), lora=ADAPTER),
        "merged": lambda: SFT(str(policy), merge_start=True),
        "reference on the policy's base": lambda: DPO(str(inputs / "model"), reference=str(policy), lora=ADAPTER),
        "reference of its own": lambda: DPO(str(inputs / "model"), reference=str(policy)),
        "critic": lambda: PPO(str(inputs / "model"), critic=str(judge), lora=ADAPTER),
        "reward model": lambda: RewardModelReward(str(judge)).scorer,
        "reward model on the policy's base": lambda: RewardModelReward(str(judge)).share(
            load_policy(inputs / "model", lora=ADAPTER)
        ),
    }
    for make in refused.values():
        with pytest.raises(UserError, match=rf"its base, {inputs}/model, holds other weights than the adapter has lea"):
            make()
    for folder in (policy, judge):
        (folder / BASE_FILE).unlink()
    for name in ("start", "reference on the policy's base", "reward model"):
        refused[name]()


def test_a_checkpoint_without_fingerprints_goes_on_as_ever(inputs, tmp_path):
    fit("dpo", inputs, tmp_path / "run", trainer=ONE, lora=ADAPTER)
    path = tmp_path / "run" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["stands_on"], checkpoint["adapter"]["base_weights"], checkpoint["adapter"]["start_weights"]
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
    retrain(inputs)
    again("dpo", inputs, path, lora=ADAPTER)
    export(str(path), str(tmp_path / "out"))
    assert not (tmp_path / "out" / BASE_FILE).exists()


def test_an_adapter_does_not_replace_the_base_that_it_stands_on(inputs, tmp_path):
    for merge in (True, False):
        with pytest.raises(UserError, match=r"export.folder: .*inputs/model holds what the run starts from \(policy\)"):
            fit("sft", inputs, inputs, merge=merge, lora=ADAPTER)
    fit("sft", inputs, tmp_path, trainer=ONE, lora=ADAPTER)
    with pytest.raises(UserError, match=r"folder: .*inputs/model holds what the run starts from \(policy\)"):
        export(str(tmp_path / "last.ckpt"), str(inputs / "model"))
    assert (inputs / "model" / "model.safetensors").exists()
