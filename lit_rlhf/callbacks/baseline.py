"""Where each curve of validation begins: the model before its first step."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Baseline(Callback):
    """Log the validation before training at step 0, where Lightning's sanity check takes all of it.

    That is `Trainer(num_sanity_val_steps=-1)`, the command line's default: Lightning runs it apart from training, with
    random numbers of its own, no checkpoint and no early stopping; a resumed run, which has its baseline, does without.
    With fewer steps it stays the check that it is, and nothing is logged.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}  # of the validation before training

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand the metrics to the loggers, which Lightning does not."""
        self.metrics = dict(trainer.callback_metrics)
        if is_baseline(trainer):
            for logger in trainer.loggers:
                logger.log_metrics({**{name: float(value) for name, value in self.metrics.items()}, "epoch": 0}, 0)


def is_baseline(trainer: Trainer) -> bool:
    """Whether the validation under way is the whole one before training."""
    whole = trainer.num_sanity_val_batches == trainer.num_val_batches
    return bool(trainer.sanity_checking and whole and trainer.global_step == 0)
