"""How far training is: a bar in a terminal, lines where none can be drawn."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console

from lit_rlhf.errors import require_types

BESIDE_THE_BAR = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second")  # what a bar has no room for

SCORES = ("rollout/reward", "rollout/shaped_score")  # the score again, where there is one reward and no shaping
BESIDE_THE_METRICS = 52  # columns of a bar: what it counts, itself, batches and time


class OneLineBar(RichProgressBar):
    """Lightning's bar in one line, also of eighty columns: epochs count from 1, as many metrics as there is room for.

    Metrics of training and of rollouts go by their last name (`score`), those of validation by their whole one.
    """

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Those of Lightning, the bar short and without batches per second, of which `perf/` says more."""
        columns = super().configure_columns(trainer)[:-1]
        columns[1].bar_width = 10
        return columns

    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        said = f"Epoch {current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        return f"{said:{len(self.validation_description)}}"  # as wide as that, else the bar jumps

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """What there is room for, training first; no number of the run."""
        room = get_console().width - BESIDE_THE_METRICS
        now = trainer.progress_bar_metrics | getattr(pl_module, "rollout_metrics", {})  # Lightning's are one behind
        names = sorted(trainer.progress_bar_metrics, key=lambda name: name.startswith("val/"))
        given = [(name, now[name]) for name in names]
        shown: dict[str, Any] = {}
        for name, value in given:
            short = name if name.startswith("val/") else name.rpartition("/")[2]
            text = f"{float(value):.3f}"
            room -= len(f"{short}: {text} ")
            if room < 0:
                break
            shown[short] = text
        return shown


class ProgressLines(Callback):
    """Say where training stands: a line at each logging step, after each validation and, on-policy, each iteration.

    Args:
        always: also where a progress bar is drawn; else only where there is none, as in a job of Slurm or under nohup.
    """

    def __init__(self, always: bool = False) -> None:
        require_types(ProgressLines.__init__, locals())
        self.always = always

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        bar = trainer.progress_bar_callback is not None and draws_bars()
        self.speaks = trainer.is_global_zero and (self.always or not bar)
        planned: float | None = getattr(pl_module, "planned_steps", None)  # none where a subclass makes its optimiser
        self.total = trainer.estimated_stepping_batches if planned is None else planned
        self.since, self.first_step, self.step = time.monotonic(), trainer.global_step, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line at the steps at which Lightning writes what is logged."""
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and every and self.step % every == 0:
            # Those of the rollout have a line of their own, when all is learnt of it.
            shown = {name for name in trainer.progress_bar_metrics if not name.startswith(("val/", "rollout/"))}
            beside = [name for name in BESIDE_THE_BAR if name in trainer.callback_metrics]
            self.say(trainer, {name: trainer.callback_metrics[name] for name in [*sorted(shown), *beside]})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line of what was validated."""
        if not trainer.sanity_checking and hasattr(self, "speaks"):
            bar = trainer.progress_bar_metrics
            self.say(trainer, {name: value for name, value in bar.items() if name.startswith("val/")})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line of the rollout that an iteration learnt from."""
        metrics = getattr(pl_module, "rollout_metrics", {})
        score = metrics.get("rollout/score")
        alike = {name for name in SCORES if score is not None and math.isclose(metrics.get(name, score), score)}
        self.say(trainer, {name: value for name, value in metrics.items() if name not in alike})

    def say(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Epoch, step, these metrics, and the time that training has taken and will take."""
        if not self.speaks or not metrics:
            return
        epochs, total = trainer.max_epochs or -1, self.total
        epoch = f"epoch {trainer.current_epoch + 1}" + (f"/{epochs}" if epochs > 0 else "")
        step = f"step {self.step}" + (f"/{total:.0f}" if math.isfinite(total) else "")
        seconds, taken = time.monotonic() - self.since, self.step - self.first_step
        clock = str(timedelta(seconds=round(seconds)))
        if taken and math.isfinite(total):
            clock += f", {timedelta(seconds=round(seconds / taken * (total - self.step)))} to go"
        values = ", ".join(f"{name} {float(value):.4g}" for name, value in metrics.items())
        rank_zero_info(f"{epoch}, {step}: {values} ({clock})")


def draws_bars() -> bool:
    """Whether the program's output is a terminal that moves its cursor, not a file or a pipe."""
    return get_console().is_interactive
