"""The last word of a run names what is there, in a terminal of eighty columns and in a pipe."""

import io
import logging
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console

from lit_rlhf.cli.commands import COMMANDS
from tests.callbacks.finished_runs import fit

LOGGER = "lightning.pytorch.utilities.rank_zero"


def lines(caplog):
    names = ("achieved", "checkpoint", "export", "next")
    said = (message.partition(": ") for message in caplog.messages)
    return {name: words for name, _, words in said if name in names}


@pytest.mark.parametrize(("stage", "command"), [("dpo", "chat"), ("reward_model", "score")])
def test_a_run_in_a_pipe_ends_with_results_best_checkpoint_export_and_a_command(
    stage, command, inputs, tmp_path, caplog
):
    saver = ModelCheckpoint(dirpath=tmp_path / "kept", monitor="val/loss")
    with caplog.at_level(logging.INFO, logger=LOGGER):
        fit(inputs, tmp_path, stage, saver=saver, limit_val_batches=1.0)
    said = lines(caplog)
    assert "val/loss" in said["achieved"] and "accuracy" in said["achieved"] and " steps in 0:" in said["achieved"]
    assert said["checkpoint"].startswith(saver.best_model_path) and "(best val/loss " in said["checkpoint"]
    assert said["export"] == str(tmp_path / "model") and Path(said["export"]).is_dir()
    assert said["next"].startswith(f"lit-rlhf {command} {tmp_path / 'model'}") and command in COMMANDS


def test_a_run_without_validation_checkpoint_or_export_says_what_there_is(inputs, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        saver = ModelCheckpoint(dirpath=tmp_path / "kept", save_top_k=0)
        fit(inputs, tmp_path, export=None, saver=saver, limit_val_batches=0)
    said = lines(caplog)
    assert said.keys() == {"achieved"} and said["achieved"].startswith("train/loss ")


def test_a_terminal_of_eighty_columns_shows_one_panel_that_fits(inputs, tmp_path, monkeypatch):
    console = Console(width=80, force_terminal=True, force_interactive=True, file=io.StringIO(), color_system=None)
    for module in ("closing", "progress"):
        monkeypatch.setattr(f"lit_rlhf.callbacks.{module}.get_console", lambda: console)
    fit(inputs, tmp_path)
    drawn = console.file.getvalue().splitlines()
    assert drawn[0].startswith("╭─ done ") and drawn[-1].startswith("╰")
    assert all(len(line) <= 80 for line in drawn) and any("lit-rlhf chat" in line for line in drawn)
