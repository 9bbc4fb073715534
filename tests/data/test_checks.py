"""What both kinds of data module refuse, check by check; test_modules.py has what a user meets of it."""

import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_rlhf.data.checks import (
    check_labels,
    check_tools,
    check_trainer_options,
    require_held_out_rows,
    require_kind,
    require_rows,
    require_rows_for_ranks,
    require_whole_epochs,
)
from lit_rlhf.data.naming import parse_sources
from lit_rlhf.errors import UserError
from tests.stages import make_stage, make_trainer


def trainer(**options):
    """What the checks read of a Trainer, with its defaults."""
    defaults = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "overfit_batches": 0.0, "callbacks": []}
    defaults |= {"val_check_interval": 1.0, "check_val_every_n_epoch": 1, "ckpt_path": None, "lightning_module": None}
    defaults |= {"reload_dataloaders_every_n_epochs": 0, "limit_train_batches": None, "fast_dev_run": False}
    defaults |= {"loggers": [], "profiler": None}
    defaults |= {"strategy": None, "num_devices": 1, "num_nodes": 1}
    defaults |= {"min_steps": None, "min_epochs": None, "log_every_n_steps": 50, "num_sanity_val_steps": 2}
    return SimpleNamespace(**defaults | options)


@pytest.mark.parametrize(
    ("train", "validation"),
    [
        ("demo", "demo"),
        ("mine.jsonl", None),
        ("mine.jsonl", "held_out.jsonl"),
        (["demo", "mine.jsonl"], "demo"),
        ({"demo": 0.5}, "demo"),
    ],
)
def test_the_demos_held_out_rows_judge_what_was_learnt_from_its_rows_among_others(train, validation):
    require_held_out_rows(train, validation)


@pytest.mark.parametrize("train", ["mine.jsonl", ["a.jsonl", "b.jsonl"], {"demo.jsonl": 1.0}])
def test_the_demos_held_out_rows_judge_nothing_else(train):
    with pytest.raises(UserError, match=r"data\.validation is still 'demo' while data\.train is"):
        require_held_out_rows(train, "demo")


def test_a_module_is_given_the_kind_of_rows_that_it_learns_from():
    class Learner:
        learns_from = "preference"

    require_kind(trainer(lightning_module=Learner()), "preference")
    require_kind(trainer(lightning_module=object()), "sft")  # a user's own module knows what it does
    require_kind(None, "sft")
    with pytest.raises(UserError, match=r"Learner learns from a PreferenceDataModule, not from a SFTDataModule; set"):
        require_kind(trainer(lightning_module=Learner()), "sft")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"accumulate_grad_batches": 0}, r"accumulate_grad_batches \(0\)"),
        ({"gradient_clip_val": -0.1}, r"gradient_clip_val \(-0.1\)"),
        ({"overfit_batches": 2}, r"overfit_batches \(2\) would replace the plan"),
        ({"overfit_batches": 0.5}, r"overfit_batches \(0.5\) would replace the plan"),
        ({"val_check_interval": 0}, r"val_check_interval \(0\) must be micro-batches, or a share"),
        ({"val_check_interval": 0.0}, r"val_check_interval \(0.0\) must be"),
        ({"min_steps": -1}, r"min_steps \(-1\) must be 0 or more"),
        ({"min_epochs": -1}, r"min_epochs \(-1\) must be 0 or more"),
        ({"log_every_n_steps": -1}, r"log_every_n_steps \(-1\) must be 0 or more"),
        ({"num_sanity_val_steps": -5}, r"num_sanity_val_steps \(-5\) must be -1 \(all\) or more"),
        ({"check_val_every_n_epoch": 0}, r"check_val_every_n_epoch \(0\) must be 1 or more"),
    ],
)
def test_what_would_change_the_planned_batches_is_refused_by_name(options, words):
    check_trainer_options(trainer(accumulate_grad_batches=4, gradient_clip_val=0.0))
    with pytest.raises(UserError, match=words):
        check_trainer_options(trainer(**options))


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        (GradientAccumulationScheduler({0: 1}), "changes the accumulation .* use accumulate_grad_batches"),
        (BatchSizeFinder(), "choose data.max_tokens"),
        (StochasticWeightAveraging(swa_lrs=1e-3), "the last is not in the export; use .*EMAWeightAveraging"),
        (BackboneFinetuning(), "none; freeze by a callback of"),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "validate"])
def test_tools_of_lightning_that_would_not_do_what_they_are_for_are_refused_with_what_to_use(callback, words, stage):
    check_tools(trainer(callbacks=[EarlyStopping("val/loss")]), stage)
    with pytest.raises(UserError, match=f"trainer.callbacks: {type(callback).__name__} .*{words}"):
        check_tools(trainer(callbacks=[callback]), stage)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lightning_module": SimpleNamespace(learns_from="prompts")}, "a policy's loss does not fall"),
        ({"lightning_module": SimpleNamespace(cache_reference=True)}, "before the reference is known"),
        ({"lightning_module": SimpleNamespace(reference_update=1)}, "before the reference is known"),
        ({"ckpt_path": "last.ckpt"}, "leave ckpt_path out"),
    ],
)
def test_a_finder_of_rates_is_refused_where_it_could_find_none(options, words):
    check_tools(trainer(callbacks=[LearningRateFinder()]), "fit")
    with pytest.raises(UserError, match=f"LearningRateFinder .*{words}"):
        check_tools(trainer(callbacks=[LearningRateFinder()], **options), "fit")


@pytest.mark.parametrize(
    ("stage", "name"),
    [("validate", "limit_val_batches"), ("test", "limit_test_batches"), ("predict", "limit_predict_batches")],
)
def test_a_command_that_would_do_nothing_is_refused_and_training_without_validation_is_not(stage, name):
    nothing = trainer(**{name: 0})
    with pytest.raises(UserError, match=rf"{name} \(0\) must be more than 0, or {stage} does nothing"):
        check_tools(nothing, stage)
    check_tools(nothing, "fit")
    check_tools(trainer(**{name: None}), stage)


@pytest.mark.parametrize("name", ["max_epochs", "max_steps", "limit_train_batches"])
def test_a_training_without_a_step_is_refused_and_a_validation_is_not(name):
    check_tools(trainer(**{name: 0}), "validate")
    with pytest.raises(UserError, match=rf"{name} \(0\) must be more than 0, or nothing is learnt"):
        check_tools(trainer(**{name: 0}), "fit")


@pytest.mark.parametrize("limit", [None, 1.0])
def test_an_iteration_on_policy_ends_with_its_rollout(limit):
    require_whole_epochs(trainer(limit_train_batches=limit))
    require_whole_epochs(trainer(limit_train_batches=1, fast_dev_run=1))


@pytest.mark.parametrize("limit", [1, 3, 0, 0.5, 0.0])
def test_an_iteration_on_policy_is_not_cut_short(limit):
    with pytest.raises(UserError, match=rf"limit_train_batches \({limit}\) would end an iteration"):
        require_whole_epochs(trainer(limit_train_batches=limit))


def test_prompts_are_not_started_anew_on_policy():
    with pytest.raises(UserError, match=r"reload_dataloaders_every_n_epochs \(1\) would play the same prompts"):
        require_whole_epochs(trainer(reload_dataloaders_every_n_epochs=1))


@pytest.mark.parametrize(("stage", "role"), [("fit", "train"), ("validate", "validation"), ("test", "test")])
def test_a_stage_without_the_rows_that_it_is_about_is_refused(stage, role):
    sources = dict.fromkeys(("train", "validation", "test", "predict"), "rows")
    require_rows(stage, sources)
    with pytest.raises(UserError, match=rf"data\.{role} is null, and {stage} needs rows"):
        require_rows(stage, sources | {role: None})


def test_predict_takes_the_validation_rows_where_it_has_none_of_its_own():
    rows, demo = parse_sources("rows.jsonl"), parse_sources("demo")
    require_rows("predict", {"predict": None, "validation": rows})
    require_rows("predict", {"predict": rows, "validation": None})
    require_rows("predict", {"predict": demo, "validation": demo})
    with pytest.raises(UserError, match=r"data\.predict is null, and data\.validation.* is 'demo': name your prompts"):
        require_rows("predict", {"predict": None, "validation": demo})
    with pytest.raises(UserError, match=r"data\.predict is null, and predict needs rows"):
        require_rows("predict", {"predict": None, "validation": None})


@pytest.mark.parametrize("several", [{"num_devices": 2}, {"num_nodes": 3}])
def test_a_strategy_of_one_device_is_not_given_several(several):
    check_trainer_options(trainer(strategy=SingleDeviceStrategy("cpu")))
    with pytest.raises(UserError, match=r"would leave all but one of \d devices on \d nodes unused: set .* ddp"):
        check_trainer_options(trainer(strategy=SingleDeviceStrategy("cpu"), **several))


@pytest.mark.parametrize("name", ["{step", "step}", "{step:x", "{step:q}", "{}}"])
def test_a_name_of_checkpoints_with_a_broken_brace_is_refused_before_the_first_is_written(name, tmp_path):
    for right in (None, "{epoch}-{step:06d}-{val/loss:.2f}", "end"):
        check_tools(trainer(callbacks=[ModelCheckpoint(tmp_path, filename=right)]), "fit")
    with pytest.raises(UserError, match=rf"trainer.callbacks: filename \({re.escape(name)}\) of ModelCheckpoint is no"):
        check_tools(trainer(callbacks=[ModelCheckpoint(tmp_path, filename=name)]), "fit")


FOLDERS = {  # an option that names a folder -> what of a Trainer has it
    "trainer.callbacks: dirpath": lambda folder: {"callbacks": [ModelCheckpoint(folder)]},
    "trainer.callbacks: dirpath ": lambda folder: {"callbacks": [OnExceptionCheckpoint(folder)]},
    "trainer.logger: save_dir": lambda folder: {"loggers": [TensorBoardLogger(folder)]},
    "trainer.logger: save_dir ": lambda folder: {"loggers": [CSVLogger(folder, name="")]},
    "trainer.profiler: dirpath": lambda folder: {"profiler": SimpleProfiler(folder, "profile")},
}


@pytest.mark.parametrize("option", FOLDERS)
def test_a_folder_that_a_run_could_not_write_into_is_told_before_training_by_its_option(option, tmp_path):
    (tmp_path / "file").touch()
    check_tools(trainer(**FOLDERS[option](tmp_path / "made" / "on the way")), "fit")
    assert (tmp_path / "made" / "on the way").is_dir()
    check_tools(trainer(**FOLDERS[option]("memory://bucket/file")), "fit")  # of no disk
    assert not Path("memory:").exists()
    for bad in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"^{option.strip()} of \w+: {bad}[\w/]* cannot be made"):
            check_tools(trainer(**FOLDERS[option](bad)), "fit")
        check_tools(trainer(**FOLDERS[option](bad), fast_dev_run=1), "fit")
    if "callbacks" in option:
        check_tools(trainer(**FOLDERS[option](bad)), "validate")  # which writes no checkpoint


def labels(desirable, undesirable):
    return SimpleNamespace(count_labels=lambda: (desirable, undesirable))


@pytest.mark.parametrize(
    ("counts", "said"), [((3, 0), r"add undesirable ones \(label: false"), ((0, 2), "add desirable")]
)
def test_completions_of_one_class_alone_are_refused_with_what_is_lacking(counts, said):
    with pytest.raises(UserError, match=rf"^all {sum(counts)} completions of the training data are .*{said}"):
        check_labels(trainer(), labels(*counts))


def weighted(desirable_weight=1.0, undesirable_weight=1.0):
    return trainer(lightning_module=SimpleNamespace(**locals()))


def test_classes_of_unequal_weight_are_warned_of_with_the_weights_that_would_balance_them():
    # λ_D 10 / (1.0 * 30) between 1 and 4/3: λ_D between 3 and 4
    with pytest.warns(UserWarning, match=r"10 completions are desirable and 30 are not.*between 3 and 4$"):
        check_labels(weighted(), labels(10, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for weight in (3.0, 3.5, 4.0):
            check_labels(weighted(weight), labels(10, 30))
        check_labels(weighted(undesirable_weight=0.3), labels(10, 30))
        check_labels(trainer(), labels(10, 30))  # a module of a user's own, without weights


def test_splits_that_run_have_a_row_for_each_rank():
    trainer = SimpleNamespace(limit_train_batches=1.0, limit_val_batches=1.0, limit_predict_batches=None)
    require_rows_for_ranks(trainer, {"train": 2, "validation": 3, "predict": 2}, ranks=2)
    for split in ("train", "validation", "predict"):
        with pytest.raises(
            UserError, match=rf"^data\.{split}: 1 of its rows can be used, too few for 2 ranks, .* fewer d"
        ):
            require_rows_for_ranks(trainer, {"train": 2, split: 1}, ranks=2)
    trainer.limit_val_batches = 0
    require_rows_for_ranks(trainer, {"train": 2, "validation": 1}, ranks=2)


@pytest.mark.parametrize(("stage", "rows"), [("sft", "sft"), ("ppo", "prompts")])
def test_held_out_rows_that_are_too_few_for_the_ranks_end_a_run_before_its_first_step(
    stage, rows, inputs, tmp_path, monkeypatch
):
    module, data = make_stage(stage, inputs)
    one = tmp_path / "one.jsonl"
    one.write_text((inputs / f"{rows}.jsonl").read_text().splitlines()[0])
    data.sources["validation"] = parse_sources(str(one))
    monkeypatch.setattr(Trainer, "world_size", 2)
    monkeypatch.setattr(Trainer, "distributed_sampler_kwargs", {"num_replicas": 2, "rank": 0})
    with pytest.raises(UserError, match=r"^data\.validation: 1 of its rows can be used, too few for 2 ranks"):
        make_trainer(tmp_path, max_epochs=8, check_val_every_n_epoch=8, limit_val_batches=1.0).fit(module, data)
