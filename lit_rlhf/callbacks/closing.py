"""The last word of a run: what was achieved, what it left where, and what to do next."""

import shlex
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from rich.panel import Panel
from rich.table import Table

from lit_rlhf.algorithms.process_reward_model import ProcessRewardModel
from lit_rlhf.algorithms.reward_model import RewardModel
from lit_rlhf.callbacks.dashboard import FIRST_RESULTS
from lit_rlhf.callbacks.export import HuggingFaceExport, monitors
from lit_rlhf.callbacks.progress import draws_bars

MOST_RESULTS = 4


def say_closing(trainer: Trainer, module: LightningModule, metrics: Mapping[str, float], seconds: float) -> None:
    """A panel where a terminal can draw one, else a line each."""
    said = closing(trainer, module, metrics, seconds)
    if draws_bars():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        for name, words in said.items():
            table.add_row(name, words)
        get_console().print(Panel(table, title="done", title_align="left", expand=False), markup=False, highlight=False)
    else:
        for name, words in said.items():
            rank_zero_info(f"{name}: {words}")


def closing(trainer: Trainer, module: LightningModule, metrics: Mapping[str, float], seconds: float) -> dict[str, str]:
    """What to say, by what it is of.

    Args:
        trainer: of a `fit` that has ended and been exported.
        module: that has learnt.
        metrics: last values.
        seconds: that training took.
    """
    results = [name for name in FIRST_RESULTS if name in metrics] or sorted(metrics.keys() & {"train/loss"})
    told = [f"{name} {metrics[name]:.4g}" for name in results[:MOST_RESULTS]]
    steps = f"{trainer.global_step} steps in {timedelta(seconds=round(seconds))}"
    said = {"achieved": ", ".join([*told, steps])}
    if checkpoint := kept(trainer):
        said["checkpoint"] = checkpoint
    root = Path(trainer.default_root_dir)
    exports = [one.folder for one in trainer.callbacks if isinstance(one, HuggingFaceExport)]  # type: ignore[attr-defined]
    folder = next((root / name for name in exports if name is not None and (root / name).is_dir()), None)
    if folder is not None:
        said["export"] = str(folder)
        if not isinstance(module, ProcessRewardModel):  # no command talks to one
            said["next"] = next_command(module, folder)
    return said


def kept(trainer: Trainer) -> str:
    """The best checkpoint by the monitor of a ModelCheckpoint, else the last; empty where none was kept."""
    for saver in monitors(trainer):
        if saver.best_model_path and saver.best_model_score is not None:
            return f"{saver.best_model_path} (best {saver.monitor} {float(saver.best_model_score):.4g})"
    paths = (
        getattr(saver, name, "")
        for saver in trainer.checkpoint_callbacks
        for name in ("last_model_path", "best_model_path")
    )
    return next(filter(None, paths), "")


def next_command(module: LightningModule, folder: Path) -> str:
    """What is done with such a model first."""
    model = shlex.quote(str(folder))
    if isinstance(module, RewardModel):
        return f"lit-rlhf score {model} --data=rows.jsonl --output=scored.jsonl"
    return f"lit-rlhf chat {model}"
