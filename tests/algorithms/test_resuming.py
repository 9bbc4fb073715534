import copy
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, LearningRateFinder, ModelCheckpoint

from lit_rlhf import KLPenalty, LoRA, RewardShaping, UserError
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.losses import bco_pair_loss, dpo_loss, ipo_loss
from tests.stages import ON_POLICY, STAGES, make_stage, make_trainer, write_inputs
from tests.tiny import save_tiny


def fit(stage, inputs, folder, ckpt_path=None, **options):
    """Three epochs, with a checkpoint after each step."""
    module, data = make_stage(stage, inputs, **copy.deepcopy(options))  # some have a state
    saver = ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = make_trainer(folder, max_epochs=3, callbacks=[saver], enable_checkpointing=True)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


# The folder of the checkpoints moves, so that both runs can be told apart.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
# Steps of a run: SFT 3 x 5, preferences 3 x 9 or so, PPO 3 iterations of 2 x 2: 4 ends one.
@pytest.mark.parametrize(
    ("stage", "step", "options"),
    [
        *((stage, 2, {}) for stage in STAGES),
        ("ppo", 4, {}),
        ("ppo", 10, {}),
        ("ppo", 3, {"target_kl": 1e-6, "shaping": RewardShaping(normalize="standardize", clip=2.0)}),
        ("ppo", 7, {"target_kl": 1e-6, "shaping": RewardShaping(normalize="scale", whiten=True)}),
        ("ppo", 2, {"critic_warmup": 2, "critic_learning_rate": 1e-3, "kl_penalty": KLPenalty("loss", "k3")}),
        ("grpo", 2, {}),
        ("reinforce", 5, {}),
        ("remax", 3, {}),
        ("dapo", 5, {}),
        ("raft", 5, {}),
        ("online_dpo", 3, {"beta": 0.2, "loss": bco_pair_loss, "reference_update": ReferenceUpdate(1.0, every=4)}),
        ("dpo", 2, {"cache_reference": True}),
        ("dpo", 3, {"reference_update": ReferenceUpdate(alpha=0.5, every=2)}),
        ("dpo", 2, {"loss": bco_pair_loss}),
        ("process_reward_model", 2, {}),
        ("kto", 3, {}),
        ("simpo", 2, {}),
        ("distillation", 2, {}),
        ("on_policy_distillation", 3, {}),
    ],
)
def test_a_resumed_run_has_the_bits_of_a_run_never_stopped(inputs, tmp_path, stage, step, options):
    whole, trainer = fit(stage, inputs, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
    resumed, resumed_trainer = fit(stage, inputs, tmp_path / "resumed", ckpt_path=checkpoint, **options)

    assert resumed_trainer.global_step == trainer.global_step > step
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name
    if stage in ON_POLICY:
        assert resumed.returns_seen == whole.returns_seen and whole.returns_seen.size > 0
        assert resumed.kl.kl_coef == whole.kl.kl_coef != 0.1
        assert resumed.rollout_metrics == whole.rollout_metrics
        assert resumed.shaping.state_dict() == whole.shaping.state_dict()
        assert torch.load(checkpoint, weights_only=False)["on_policy"]["stopped"] == ("target_kl" in options)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
@pytest.mark.parametrize(("stage", "steps"), [("sft", 2), ("sft", 7), ("dpo", 4), ("ppo", 3)])
def test_an_epoch_that_max_steps_cut_short_is_gone_on_with(inputs, tmp_path, stage, steps):
    same = {"lr_scheduler": "constant"}  # however many steps are planned
    torch.manual_seed(0)  # of the critic's head
    whole, trainer = fit(stage, inputs, tmp_path / "whole", **same)
    torch.manual_seed(0)
    module, data = make_stage(stage, inputs, **same)
    first = make_trainer(tmp_path / "cut", max_epochs=3, max_steps=steps, enable_checkpointing=True)
    first.fit(module, data)
    [cut] = (tmp_path / "cut").rglob("*.ckpt")
    resumed, resumed_trainer = fit(stage, inputs, tmp_path / "resumed", ckpt_path=cut, **same)
    assert resumed_trainer.global_step == trainer.global_step > steps
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_frozen_weights_stay_out_of_checkpoints(inputs, tmp_path, stage):
    module, _ = fit(stage, inputs, tmp_path)
    content = torch.load(tmp_path / "step=2.ckpt", weights_only=False)
    assert set(content["state_dict"]) == set(module.state_dict())
    assert not any("reference" in name for name in content["state_dict"])


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_the_reference_is_the_same_before_and_after_training(inputs, tmp_path, stage):
    module, data = make_stage(stage, inputs)
    before = {name: p.clone() for name, p in module.frozen["reference"].named_parameters()}
    start = {name: p.clone() for name, p in module.policy.named_parameters()}
    make_trainer(tmp_path, max_epochs=1).fit(module, data)
    assert any(not torch.equal(p, start[name]) for name, p in module.policy.named_parameters())
    for name, p in module.frozen["reference"].named_parameters():
        assert torch.equal(p, before[name])


def test_the_checkpoint_of_another_model_is_refused_with_a_tensor_that_differs(inputs, tmp_path):
    _, trainer = fit("sft", inputs, tmp_path / "sft")
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    (tmp_path / "other").mkdir()
    write_inputs(tmp_path / "other")
    save_tiny(tmp_path / "other" / "model", "gpt2")
    with pytest.raises(UserError, match=r"is of another model, \d+ tensors differ, like policy"):
        fit("sft", tmp_path / "other", tmp_path / "again", ckpt_path=tmp_path / "sft.ckpt")


@pytest.mark.filterwarnings("ignore:.*sparse tensor")  # some releases of torch warn of each
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor.int(), r"\(32,\) of int32 there, \(32,\) here"),
        (lambda tensor: tensor.to("meta"), r"strided, meta there, \(32,\) here"),
        (lambda tensor: tensor.to_sparse(), r"sparse_coo, cpu there, \(32,\) here"),
    ],
)
def test_tensors_that_are_whole_numbers_or_hold_none_are_refused_by_name(change, said, inputs, tmp_path):
    fit("sft", inputs, tmp_path)
    checkpoint, key = torch.load(tmp_path / "step=2.ckpt"), "policy.model.model.norm.weight"
    checkpoint["state_dict"][key] = change(checkpoint["state_dict"][key])
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=rf"other\.ckpt is of another model, 1 tensors differ, like {key} \({said}"):
        fit("sft", inputs, tmp_path / "again", ckpt_path=tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("theirs", "mine", "said"),
    [
        ({"lora": LoRA(r=4)}, {}, "trained an adapter, this one trains none: give model.lora and model.policy"),
        ({}, {"lora": LoRA(r=4)}, "trained none, this one trains an adapter: give model.lora and model.policy"),
        ({"lora": LoRA(r=4)}, {"lora": LoRA(r=3)}, "has lora.r 4, this run's has 3: give model.lora and"),
        ({"lora": LoRA(r=4)}, {"lora": LoRA(r=4, alpha=2.0)}, "has lora.alpha 32.0, this run's has 2.0: give"),
        (
            {"lora": LoRA(r=4)},
            {"lora": LoRA(r=4, target_modules=["q_proj"])},
            r"is of another model, \d+ tensors differ, like \S+down_proj.lora_A\S+ \(\(4, 48\) there, missing here\)",
        ),
    ],
)
def test_the_checkpoint_of_another_adapter_or_of_none_is_refused_by_what_differs(theirs, mine, said, inputs, tmp_path):
    fit("dpo", inputs, tmp_path, **theirs)
    with pytest.raises(UserError, match=rf"^ckpt_path: .*step=2\.ckpt {said}"):
        fit("dpo", inputs, tmp_path / "again", ckpt_path=tmp_path / "step=2.ckpt", **mine)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_the_checkpoint_of_a_run_that_broke_down_is_refused_with_a_tensor_that_did(inputs, tmp_path, value):
    module, trainer = fit("sft", inputs, tmp_path / "sft")
    with torch.no_grad():
        module.policy.model.model.norm.weight[3] = value
    trainer.save_checkpoint(tmp_path / "broken.ckpt")
    with pytest.raises(
        UserError, match=r"1 of \d+ tensors .* NaN, infinity or no numbers, like policy.model.model.norm.weight"
    ):
        fit("sft", inputs, tmp_path / "again", ckpt_path=tmp_path / "broken.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using")
def test_an_iteration_under_way_is_not_gone_on_with_by_another_plan(inputs, tmp_path):
    fit("ppo", inputs, tmp_path / "whole")
    module, data = make_stage("ppo", inputs)
    module.updates = replace(module.updates, num_minibatches=4)
    with pytest.raises(
        UserError, match=r"in the middle of an iteration of .*'num_minibatches': 2.* 'num_minibatches': 4"
    ):
        make_trainer(tmp_path, max_epochs=3).fit(module, data, ckpt_path=tmp_path / "whole" / "step=3.ckpt")


def test_the_checkpoint_of_another_algorithm_is_refused_by_name(inputs, tmp_path):
    _, trainer = fit("sft", inputs, tmp_path / "sft")
    trainer.save_checkpoint(tmp_path / "sft.ckpt")
    with pytest.raises(UserError, match=r"ckpt_path: \S+\.ckpt is of SFT, this run is of DPO"):
        fit("dpo", inputs, tmp_path / "dpo", ckpt_path=tmp_path / "sft.ckpt")


class Rates(Callback):
    """The rate of each optimiser step, and the groups at the last."""

    def __init__(self):
        self.rates, self.groups = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.groups = [{**group, "params": None} for group in optimizer.param_groups]


CHANGED = {"learning_rate": 5e-2, "weight_decay": 0.3, "adam_betas": (0.8, 0.9), "adam_eps": 1e-3}


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_options_of_this_run_are_honoured_where_the_checkpoints_run_had_others(stage, old, inputs, tmp_path, caplog):
    changed = CHANGED | ({"critic_learning_rate": 0.25} if stage == "ppo" else {})
    fit(stage, inputs, tmp_path, lr_scheduler="constant", warmup_steps=0)
    file = tmp_path / "step=2.ckpt"
    if old:  # of a version that kept hyper-parameters alone
        checkpoint = torch.load(file)
        del checkpoint["optimizer_options"]
        torch.save(checkpoint, file)
    module, data = make_stage(stage, inputs, lr_scheduler="constant", warmup_steps=0, **changed)
    rates = Rates()
    trainer = make_trainer(tmp_path, max_steps=4, max_epochs=9, callbacks=[rates])
    with caplog.at_level("INFO"):
        trainer.fit(module, data, ckpt_path=file)
    assert rates.rates == [5e-2, 5e-2]
    assert rates.groups[0]["weight_decay"] == 0.3 and rates.groups[1]["weight_decay"] == 0.0
    assert {(tuple(group["betas"]), group["eps"]) for group in rates.groups} == {((0.8, 0.9), 1e-3)}
    assert stage == "sft" or [group["lr"] for group in rates.groups] == [0.05, 0.05, 0.25, 0.25]
    (said,) = [record.message for record in caplog.records if "goes on with options of this run" in record.message]
    assert all(f"{name} " in said for name in changed) and "lr_scheduler" not in said
    assert "learning_rate 0.05 (it was 0.01), weight_decay 0.3 (it was 0.0)" in said


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_settings_of_the_method_that_are_others_than_the_checkpoints_are_told(inputs, tmp_path, caplog):
    module, data = make_stage("dpo", inputs, beta=0.1)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for beta, loss in ((0.1, dpo_loss), (0.5, ipo_loss)):
        caplog.clear()
        module, data = make_stage("dpo", inputs, beta=beta, loss=loss)
        with caplog.at_level("INFO"):
            make_trainer(tmp_path, max_steps=2).fit(module, data, ckpt_path=tmp_path / "one.ckpt")
        said = [record.message for record in caplog.records if "settings of this run are other" in record.message]
        assert len(said) == (beta == 0.5)
    assert "beta 0.5 (it was 0.1), loss lit_rlhf.losses.preference.ipo_loss (it was lit_rlhf.losses." in said[0]


@pytest.mark.filterwarnings("ignore")
def test_a_rate_that_was_found_goes_on_where_the_options_are_as_they_were(inputs, tmp_path, caplog):
    module, data = make_stage("sft", inputs, lr_scheduler="constant", warmup_steps=0)
    finder = LearningRateFinder(num_training_steps=30, early_stop_threshold=None)
    trainer = make_trainer(tmp_path, max_steps=2, callbacks=[finder])
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "found.ckpt")
    module, data = make_stage("sft", inputs, lr_scheduler="constant", warmup_steps=0)
    rates = Rates()
    longer = make_trainer(tmp_path, max_steps=4, max_epochs=9, callbacks=[rates])
    with caplog.at_level("INFO"):
        longer.fit(module, data, ckpt_path=tmp_path / "found.ckpt")
    assert rates.rates == [finder.optimal_lr.suggestion()] * 2 != [1e-2] * 2
    assert "options of this run" not in caplog.text


def test_the_state_of_another_optimiser_is_refused(inputs, tmp_path):
    fit("sft", inputs, tmp_path)
    file = tmp_path / "step=2.ckpt"
    checkpoint = torch.load(file)
    checkpoint["optimizer_options"]["optimizer"] = "adamw_8bit"
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match=r"ckpt_path: \S+ holds the state of optimizer adamw_8bit, this run has adamw"):
        fit("sft", inputs, tmp_path / "on", ckpt_path=file)
    checkpoint["optimizer_options"] = 3
    torch.save(checkpoint, file)
    with pytest.raises(UserError, match=r"ckpt_path: \S+ is damaged.*options of the optimiser: expected a mapping"):
        fit("sft", inputs, tmp_path / "on", ckpt_path=file)


def test_a_finished_run_goes_on_at_the_rate_of_the_longer_schedule(inputs, tmp_path):
    module, data = make_stage("sft", inputs, warmup_steps=0)
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "finished.ckpt", weights_only=False)
    module, data = make_stage("sft", inputs, warmup_steps=0)
    rates = Rates()
    longer = make_trainer(tmp_path, max_steps=4, max_epochs=9, callbacks=[rates])
    longer.fit(module, data, ckpt_path=tmp_path / "finished.ckpt", weights_only=False)
    assert rates.rates == [0.5e-2, 0.25e-2]  # of 1e-2, linear over 4 steps


def test_a_damaged_state_is_refused_by_file_before_a_step_is_computed_with_it(inputs, tmp_path):
    fit("sft", inputs, tmp_path)
    file = tmp_path / "step=2.ckpt"
    whole = torch.load(file)
    said = {
        "optimizer": "exp_avg",
        "counters": "fit_loop",
        "data": "combined_loader",
        "callback": r"ModelCheckpoint\]\['best_k_models",
        "ground": "stands_on",
    }
    for part in said:
        checkpoint = copy.deepcopy(whole)
        loop = checkpoint["loops"]["fit_loop"]
        if part == "optimizer":
            checkpoint["optimizer_states"][0]["state"][0]["exp_avg"] = torch.ones(3)
        elif part == "counters":
            loop["epoch_progress"]["total"]["ready"] = "x"
        elif part == "data":
            loop["state_dict"]["combined_loader"] = [{"epoch": "x"}]
        elif part == "callback":
            next(iter(checkpoint["callbacks"].values()))["best_k_models"] = [3]
        else:
            checkpoint["stands_on"] = {"policy": "x"}
        torch.save(checkpoint, file)
        with pytest.raises(UserError, match=f"^ckpt_path: {file}(: it)? is damaged.*{said[part]}"):
            fit("sft", inputs, tmp_path, ckpt_path=file)


OF_METHODS = [  # which stage, where in its checkpoint, what stands there, and what is said of it
    ("ppo", ("on_policy",), 3, "on_policy: expected a mapping"),
    ("ppo", ("on_policy", "kl"), 3, "kl: expected a mapping"),
    ("ppo", ("on_policy", "kl", "kl_coef"), "x", "kl_coef.*: expected a finite number, found str"),
    ("ppo", ("on_policy", "kl", "kl_coef"), float("nan"), "kl_coef.*: expected a finite number"),
    ("ppo", ("on_policy", "shaping"), 3, "shaping: expected a mapping"),
    ("ppo", ("on_policy", "stopped"), 3, "stopped.*: expected true or false"),
    ("ppo", ("on_policy", "returns_seen"), [1.0, "x", 2.0], "returns_seen.*: expected a finite number"),
    ("ppo", ("loops", "fit_loop", "state_dict", "combined_loader", 0, "ranks"), 3, "ranks"),
    ("reward_model", ("scores",), 3, r"scores.*: expected a mapping"),
    ("reward_model", ("scores", "moments"), [1.0, float("inf"), 2.0], r"scores.*moments.*: expected a finite number"),
    ("dpo", ("loss",), 3, "loss"),
    ("dpo", ("reference_cache",), 3, "reference"),
    ("dpo", ("stands_on", "reference"), 3, "stands_on"),
]


@pytest.mark.parametrize("stage", ["ppo", "reward_model", "dpo"])
def test_a_damaged_state_of_a_method_is_refused_by_file(stage, inputs, tmp_path):
    fit(stage, inputs, tmp_path)
    file = tmp_path / "step=2.ckpt"
    whole = torch.load(file)
    for _, (*above, last), value, said in [case for case in OF_METHODS if case[0] == stage]:
        checkpoint = copy.deepcopy(whole)
        place = checkpoint
        for key in above:
            place = place[key]
        place[last] = value
        torch.save(checkpoint, file)
        with pytest.raises(UserError, match=f"^ckpt_path: {file}(: it)? is damaged.*{said}"):
            fit(stage, inputs, tmp_path, ckpt_path=file)


def test_a_run_whose_reference_was_cached_does_not_go_on_without_the_cache(inputs, tmp_path):
    fit("dpo", inputs, tmp_path, cache_reference=True)
    with pytest.raises(UserError, match="cache_reference is false, and the run of the checkpoint had its reference as"):
        fit("dpo", inputs, tmp_path, ckpt_path=tmp_path / "step=2.ckpt")
