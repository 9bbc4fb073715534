"""What training says where no bar can be drawn."""

import math
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console

BESIDE_THE_BAR = ("train/grad_norm", "train/learning_rate", "perf/tokens_per_second")  # what a bar has no room for


class ProgressLines(Callback):
    """Say where training stands: a line at each logging step, after each validation and, on-policy, each iteration.

    Args:
        always: also where a progress bar is drawn; else only where there is none, as in a job of Slurm or under nohup.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        bar = trainer.progress_bar_callback is not None and draws_bars()
        self.speaks = trainer.is_global_zero and (self.always or not bar)
        self.since, self.first_step, self.step = time.monotonic(), trainer.global_step, trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A line at the steps at which Lightning writes what is logged."""
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if stepped and every and self.step % every == 0:
            shown = {name for name in trainer.progress_bar_metrics if not name.startswith("val/")}
            beside = [name for name in BESIDE_THE_BAR if name in trainer.callback_metrics]
            self.say(trainer, {name: trainer.callback_metrics[name] for name in [*sorted(shown), *beside]})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line of what was validated."""
        if not trainer.sanity_checking and hasattr(self, "speaks"):
            bar = trainer.progress_bar_metrics
            self.say(trainer, {name: value for name, value in bar.items() if name.startswith("val/")})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A line of the rollout that an iteration learnt from."""
        self.say(trainer, getattr(pl_module, "rollout_metrics", {}))

    def say(self, trainer: Trainer, metrics: dict[str, Any]) -> None:
        """Epoch, step, these metrics, and the time that training has taken and will take."""
        if not self.speaks or not metrics:
            return
        epochs, total = trainer.max_epochs or -1, trainer.estimated_stepping_batches
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
