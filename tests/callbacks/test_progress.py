"""A run without a bar says where it stands."""

import logging
import re
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import TQDMProgressBar

from lit_rlhf.callbacks import ProgressLines
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
    assert f"rollout/score {module.rollout_metrics['rollout/score']:.4g}" in said[-1]


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
    trainer = SimpleNamespace(max_epochs=-1, current_epoch=7, estimated_stepping_batches=float("inf"))
    lines.speaks, lines.since, lines.first_step, lines.step = True, 0.0, 0, 40
    monkeypatch.setattr("lit_rlhf.callbacks.progress.time.monotonic", lambda: 61.0)
    lines.say(trainer, {"train/loss": 2.0})
    lines.say(trainer, {})
    assert said == ["epoch 8, step 40: train/loss 2 (0:01:01)"]


def test_lines_go_where_lightning_s_own_do(caplog):
    lines = ProgressLines()
    lines.speaks, lines.since, lines.first_step, lines.step = True, 0.0, 0, 1
    trainer = SimpleNamespace(max_epochs=1, current_epoch=0, estimated_stepping_batches=1)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        lines.say(trainer, {"train/loss": 2.0})
    assert "step 1/1: train/loss 2" in caplog.text
