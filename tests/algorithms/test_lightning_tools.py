"""Lightning's own tools on these modules: rates found are used, monitors that nobody logs are told, rounding too."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
)
from transformers import get_scheduler

from lit_rlhf import UserError
from lit_rlhf.algorithms import lightning_tools
from lit_rlhf.algorithms.lightning_tools import share_that_moves, take_rate, warn_of_rounding
from lit_rlhf.callbacks import HuggingFaceExport
from tests.stages import STAGES, make_stage, make_trainer


class Rates(Callback):
    """The rate of each step of the run."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *arguments):
        self.seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_the_rate_that_a_finder_sets_is_the_rate_that_trains(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs, learning_rate=1e-3, lr_scheduler="linear", warmup_steps=2)
    finder, rates = LearningRateFinder(num_training_steps=30, early_stop_threshold=None), Rates()
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[finder, rates])
    trainer.fit(module, data)
    found = finder.optimal_lr.suggestion()
    assert module.learning_rate == found != 1e-3
    assert torch.tensor(rates.seen)[:, 0].tolist() == pytest.approx([found * x for x in (0, 0.5, 1, 0.75, 0.5, 0.25)])


def test_groups_keep_the_ratio_of_their_rates_and_the_schedule_its_share():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.AdamW([{"params": [w], "lr": lr} for w, lr in zip(weights, (1e-3, 5e-3), strict=True)])
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=4)
    optimizer.step()
    schedule.step()
    take_rate(optimizer, schedule, 1e-3, 2e-3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1.5e-3, 7.5e-3])
    schedule.step()
    assert schedule.get_last_lr() == pytest.approx([1e-3, 5e-3])


class Started(Callback):
    """Whether a step was taken."""

    steps = 0

    def on_train_batch_end(self, *arguments):
        self.steps += 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_a_monitor_of_validation_that_nothing_logs_is_told_before_the_first_step(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    watch = Started()
    options = {"limit_val_batches": None, "num_sanity_val_steps": 1, "max_epochs": 1}
    trainer = make_trainer(tmp_path, callbacks=[EarlyStopping("val_kl"), watch], **options)
    with pytest.raises(UserError, match=r"EarlyStopping: nothing logs its monitor 'val_kl'; (did you mean|there are)"):
        trainer.fit(module, data)
    assert watch.steps == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_every_metric_of_a_run_can_be_watched(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    options = {"limit_val_batches": None, "num_sanity_val_steps": 1, "max_epochs": 1}
    (trainer := make_trainer(tmp_path, **options)).fit(module, data)
    names = set(trainer.callback_metrics)
    assert any(name.startswith("val/") for name in names)
    module, data = make_stage(stage, inputs)
    watching = [
        ModelCheckpoint(tmp_path / "kept", filename=str(i), monitor=name) for i, name in enumerate(sorted(names))
    ]
    watching += [ModelCheckpoint(tmp_path / "counted", filename=name, monitor=name) for name in ("epoch", "step")]
    watching.append(EarlyStopping("nowhere", strict=False))
    make_trainer(tmp_path, callbacks=watching, enable_checkpointing=True, **options).fit(module, data)


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_of_training_that_nothing_logs_is_told_at_the_end_of_the_epoch(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    trainer = make_trainer(
        tmp_path, max_epochs=2, callbacks=[EarlyStopping("train_loss", check_on_train_epoch_end=True)]
    )
    with pytest.raises(UserError, match=r"nothing logs its monitor 'train_loss'; did you mean train/loss"):
        trainer.fit(module, data)
    assert trainer.current_epoch == 0


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_of_validation_in_a_run_without_any_is_told(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    with pytest.raises(UserError, match="'val/loss' is measured on held-out rows, and this run has none"):
        make_trainer(tmp_path, max_epochs=1, callbacks=[EarlyStopping("val/loss")]).fit(module, data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_averaged_weights_are_what_is_exported(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    before = {name: weight.clone() for name, weight in module.exportable().state_dict().items()}
    average, last = EMAWeightAveraging(decay=0.5), {}

    class Keep(Callback):
        def on_train_end(self, trainer, pl_module):  # before the average takes the place of the last weights
            last.update({name: weight.clone() for name, weight in pl_module.exportable().state_dict().items()})

    make_trainer(tmp_path, max_epochs=1, callbacks=[Keep(), average, HuggingFaceExport()]).fit(module, data)
    after = type(module.exportable()).from_pretrained(tmp_path / "model").state_dict()
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(after[name], last[name]) and not torch.equal(after[name], before[name])
    assert (after[name] - before[name]).norm() < (last[name] - before[name]).norm()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", ["sft", "ppo"])
@pytest.mark.parametrize("which", ["best", "last"])
def test_pruned_weights_are_what_is_exported(stage, which, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    saver = ModelCheckpoint(dirpath=tmp_path, monitor="epoch", save_on_train_epoch_end=True)
    callbacks = [ModelPruning("l1_unstructured", amount=0.5), saver, HuggingFaceExport(which=which)]
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True, callbacks=callbacks).fit(module, data)
    layer = type(module.exportable()).from_pretrained(tmp_path / "model").model.layers[0].mlp.down_proj.weight
    assert torch.equal(layer, module.exportable().model.layers[0].mlp.down_proj.weight)
    assert 0.3 < (layer == 0).float().mean().item() < 0.7


def test_the_share_of_weights_that_a_step_moves_is_counted_in_their_own_precision():
    weights = torch.linspace(0.01, 1.0, 1000)
    assert share_that_moves([weights], 1e-6) == 1.0
    low = weights.bfloat16()
    moved = ((low + torch.tensor(1e-3, dtype=torch.bfloat16)) != low).float().mean().item()
    assert share_that_moves([low], 1e-3) == pytest.approx(moved)
    assert 0.1 < moved < 0.9
    assert share_that_moves([low], 1e-6) == 0.0
    assert share_that_moves([torch.zeros(0)], 1.0) == share_that_moves([], 1.0) == 1.0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stage", STAGES)
def test_pure_bfloat16_at_a_rate_that_it_rounds_away_is_told_with_what_to_use(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs, learning_rate=1e-6)
    with pytest.warns(
        UserWarning, match=r"learning_rate \(1e-06\) moves \d+\.\d% .* Use trainer.precision: bf16-mixed"
    ):
        make_trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(module, data)


@pytest.mark.filterwarnings("ignore")
def test_the_share_that_is_told_is_within_half_of_what_moves_in_twenty_steps(inputs, tmp_path):
    module, data = make_stage("sft", inputs, learning_rate=1e-5, lr_scheduler="constant")
    module.bfloat16()
    before = [weight.detach().clone() for weight in module.parameters()]
    told = share_that_moves(before, 1e-5)
    make_trainer(tmp_path, max_epochs=-1, max_steps=20, precision="bf16-true").fit(module, data)
    after = list(module.parameters())
    moved = sum(int((now != then).sum()) for now, then in zip(after, before, strict=True))
    share = moved / sum(weight.numel() for weight in after)
    # AdamW's steps are those of the rate only where gradients agree: here they are about half of it on average.
    assert told / 1.5 < share < told * 1.5
    assert 0 < told < 0.2


def test_a_rate_that_moves_the_weights_is_no_warning(recwarn):
    weights = torch.nn.Parameter(torch.full((8,), 0.1, dtype=torch.bfloat16))
    warn_of_rounding([weights], 1e-2, "bf16-true")
    warn_of_rounding([torch.nn.Parameter(torch.ones(8))], 1e-6, "32-true")
    assert not recwarn.list


@pytest.mark.parametrize(
    ("every", "epochs", "current", "told"),
    [(8, 2, 0, True), (8, 8, 0, False), (1, 1, 0, False), (8, 15, 8, True), (8, 16, 8, False), (8, -1, 0, False)],
)
def test_a_validation_that_never_comes_is_told(monkeypatch, every, epochs, current, told):
    said = []
    monkeypatch.setattr(lightning_tools, "rank_zero_info", said.append)
    trainer = SimpleNamespace(
        enable_validation=True,
        num_val_batches=[2],
        check_val_every_n_epoch=every,
        max_epochs=epochs,
        current_epoch=current,
        max_steps=-1,
        num_training_batches=4,
        accumulate_grad_batches=1,
        val_check_batch=4,
        global_step=0,
        callbacks=[],
    )
    lightning_tools.require_validation(trainer)
    assert bool(said) is told and all("check_val_every_n_epoch" in line for line in said)


@pytest.mark.parametrize(
    ("steps", "options", "due"),
    [
        (3, {}, 5),  # at the end of an epoch of five batches
        (2, {"accumulate_grad_batches": 2}, 3),
        (3, {"val_check_interval": 5}, 5),
        (5, {"val_check_interval": 5}, None),
        (3, {"check_val_every_n_epoch": None, "val_check_interval": 20}, 20),
    ],
)
def test_a_run_that_ends_before_its_first_validation_says_so(steps, options, due, inputs, tmp_path, caplog):
    module, data = make_stage("dpo", inputs)
    counted = []
    trainer = make_trainer(
        tmp_path, max_steps=steps, limit_val_batches=1, num_sanity_val_steps=0, limit_train_batches=5, **options
    )
    module.on_validation_epoch_end = lambda: counted.append(trainer.global_step)
    with caplog.at_level("INFO"):
        trainer.fit(module, data)
    assert bool(counted) is (due is None)
    assert ("nothing will be validated" in caplog.text) is (due is not None)
    assert due is None or f"that is due at step {due} " in caplog.text
