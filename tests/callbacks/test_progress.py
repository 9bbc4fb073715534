"""A run without a bar says where it stands."""

import io
import logging
import math
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar
from rich.console import Console
from rich.progress import Progress, TextColumn

from lit_rlhf.callbacks import OneLineBar, ProgressLines
from tests.stages import make_stage, make_trainer


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("lit_rlhf.callbacks.progress.rank_zero_info", lines.append)
    return lines


def fit(stage, inputs, folder, callbacks=(), **options):
    module, data = make_stage(stage, inputs)
    options = {"max_epochs": 2, "limit_val_batches": None, "log_every_n_steps": 2} | options
    make_trainer(folder, callbacks=[*callbacks], **options).fit(module, data)
    return module


@pytest.mark.filterwarnings("ignore:Total length")
def test_a_run_without_a_bar_says_a_line_at_each_logging_step_and_validation(inputs, tmp_path, said):
    fit("sft", inputs, tmp_path, [ProgressLines()], max_steps=4)
    steps = [re.match(r"epoch (\d)/2, step (\d)/4: ", line).groups() for line in said]
    trained = [step for line, step in zip(said, steps, strict=True) if "train/loss" in line]
    assert trained == [("1", "2"), ("2", "4")] and len([line for line in said if "val/loss" in line]) >= 1
    for line in said:
        values = line.split(": ", 1)[1].split(" (")[0].split(", ")
        assert all(re.fullmatch(r"[\w/]+ -?[\d.]+(e[-+]\d+)?", value) for value in values), line
        assert re.search(r"\(0:00:\d\d, 0:00:\d\d to go\)$", line)
        assert not ("train/" in line and "val/" in line)
    assert "train/learning_rate" in said[0] and "train/grad_norm" in said[0]


def test_an_iteration_says_what_its_rollout_was(inputs, tmp_path, said):
    module = fit("ppo", inputs, tmp_path, [ProgressLines()], log_every_n_steps=100, limit_val_batches=0)
    assert len(said) == 2 and said[-1].startswith("epoch 2/2, step 8/8: ")
    assert "rollout/shaped_score" not in said[-1] and "rollout/reward" not in said[-1]  # they are the score again
    assert f"rollout/score {module.rollout_metrics['rollout/score']:.4g}" in said[-1]


def test_no_line_says_what_an_earlier_rollout_was(inputs, tmp_path, said):
    fit("ppo", inputs, tmp_path, [ProgressLines()], log_every_n_steps=4, limit_val_batches=0)
    assert [("train/loss" in line, "rollout/score" in line) for line in said] == 2 * [(True, False), (False, True)]


@pytest.mark.parametrize(
    ("bar", "terminal", "always", "speaks"),
    [(True, True, False, False), (True, False, False, True), (False, True, False, True), (True, True, True, True)],
)
def test_lines_are_said_where_no_bar_is_drawn(inputs, tmp_path, said, monkeypatch, bar, terminal, always, speaks):
    monkeypatch.setattr(
        "lit_rlhf.callbacks.progress.get_console", lambda: SimpleNamespace(is_interactive=terminal), raising=True
    )
    bars = [TQDMProgressBar()] if bar else []
    options = {"limit_val_batches": 0, "max_steps": 2, "enable_progress_bar": bar}
    fit("sft", inputs, tmp_path, [ProgressLines(always), *bars], **options)
    assert bool(said) == speaks


def test_a_run_without_end_says_no_time_to_go(inputs, tmp_path, said, monkeypatch):
    lines = ProgressLines()
    trainer = SimpleNamespace(max_epochs=-1, current_epoch=7)
    lines.speaks, lines.since, lines.first_step, lines.step, lines.total = True, 0.0, 0, 40, math.inf
    monkeypatch.setattr("lit_rlhf.callbacks.progress.time.monotonic", lambda: 61.0)
    lines.say(trainer, {"train/loss": 2.0})
    lines.say(trainer, {})
    assert said == ["epoch 8, step 40: train/loss 2 (0:01:01)"]


def test_lines_go_where_lightning_s_own_do(caplog):
    lines = ProgressLines()
    lines.speaks, lines.since, lines.first_step, lines.step, lines.total = True, 0.0, 0, 1, 1
    trainer = SimpleNamespace(max_epochs=1, current_epoch=0)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        lines.say(trainer, {"train/loss": 2.0})
    assert "step 1/1: train/loss 2" in caplog.text


def test_the_lines_of_dpo_say_what_one_watches(inputs, tmp_path, said):
    fit("dpo", inputs, tmp_path, [ProgressLines()], max_epochs=1, log_every_n_steps=1, limit_val_batches=1.0)
    trained = next(line for line in said if "train/loss" in line)
    assert "dpo/reward_accuracy" in trained and "dpo/reward_margin" in trained
    assert any("val/reward_accuracy" in line and "val/loss" in line for line in said)


LONG = {"val/score": 1.0, "train/loss": 0.25, "rollout/score": -1.5, "rollout/kl": 0.125, "val/loss": 2.0}


@pytest.mark.parametrize(
    ("columns", "metrics"),
    [
        (80, {"loss": "0.250", "score": "-1.500"}),
        (200, {"loss": "0.250", "score": "-1.500", "kl": "0.125", "val/score": "1.000", "val/loss": "2.000"}),
    ],
)
def test_a_bar_is_one_line_and_counts_epochs_from_1(columns, metrics, monkeypatch):
    console = Console(width=columns, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr("lit_rlhf.callbacks.progress.get_console", lambda: console)
    bar, trainer = OneLineBar(), SimpleNamespace(max_epochs=16, progress_bar_metrics=LONG)
    bar._trainer = trainer
    assert bar._get_train_description(0) == "Epoch 1/16"
    assert bar.get_metrics(trainer, None) == metrics
    score = bar.get_metrics(trainer, SimpleNamespace(rollout_metrics={"rollout/score": 3.5, "rollout/x": 1.0}))["score"]
    assert score == "3.500"  # of the rollout that is learnt from, where Lightning still has the one before
    line = Progress(*bar.configure_columns(trainer), TextColumn("{task.fields[metrics]}"), console=console)
    shown = " ".join(f"{name}: {value}" for name, value in metrics.items())
    line.add_task(bar._get_train_description(15), total=1000, completed=999, metrics=shown)
    with console.capture() as drawn:
        console.print(line.get_renderable())
    assert drawn.get().count("\n") == 1 and f"score: {metrics['score']}" in drawn.get()
    trainer.max_epochs = -1
    assert bar._get_train_description(0).strip() == "Epoch 1"
