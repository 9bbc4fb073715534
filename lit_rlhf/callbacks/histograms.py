"""How values spread whose mean says too little: scores, advantages, ratios, lengths, KL by token, margins of pairs."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.callbacks.baseline import is_baseline
from lit_rlhf.callbacks.plots import calibration_plot
from lit_rlhf.callbacks.showing import show_histogram, show_image
from lit_rlhf.data.batches import NoBatch, RolloutBatch
from lit_rlhf.errors import require, require_types

OF_ROLLOUTS = "rollout/"
SPREAD = "_spread"  # ends the tag: TensorBoard would show no scalar of the same one
Watched = dict[str, list[Tensor]] | None


class Histograms(Callback):
    """Write histograms of what the module watches, of the values on rank 0, and how well a reward model is calibrated.

    Of each rollout and the last optimiser step on it, of each validation, and of an optimiser step in `every` on pairs:
    between them nothing is kept.

    Args:
        every: optimiser steps on pairs from one histogram to the next; 0 = no histograms at all.
    """

    def __init__(self, every: int = 50) -> None:
        require_types(Histograms.__init__, locals())
        require(every >= 0, "every", every, "0 (none) or more optimiser steps")
        self.every = every
        self.step = 0
        self.of_training: Watched = None  # while validation is watched

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The rollout is played as the first batch is asked for, which is after this."""
        self.step = trainer.global_step
        self.watch(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Off policy, a step that is due; on policy, the step before gives way to this one."""
        assert isinstance(pl_module, AlignmentModule)
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        if isinstance(batch, RolloutBatch | NoBatch):
            if stepped and pl_module.watched is not None:
                rollout = {name: kept for name, kept in pl_module.watched.items() if name.startswith(OF_ROLLOUTS)}
                pl_module.watched = rollout
        elif stepped and self.every and self.step % self.every == 0:
            self.watch(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write those of a step on pairs."""
        if trainer.global_step > self.step and not isinstance(batch, RolloutBatch | NoBatch):
            self.write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write those of a rollout."""
        self.write(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Those of validation are its own."""
        assert isinstance(pl_module, AlignmentModule)
        self.of_training = pl_module.watched
        pl_module.watched = None
        if not trainer.sanity_checking or is_baseline(trainer):
            self.watch(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them; a reward model has gathered its pairs, and not yet reported of them."""
        assert isinstance(pl_module, AlignmentModule)
        bins = getattr(pl_module, "bins", None)
        if bins is not None and pl_module.watched is not None:
            picture = calibration_plot(pl_module.sum_over_ranks(bins).numpy())
            for logger in trainer.loggers if trainer.is_global_zero else ():
                show_image(logger, "val/calibration", picture, trainer.global_step)
        self.write(trainer, pl_module)
        pl_module.watched = self.of_training

    def watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on, where there is a logger to write to."""
        assert isinstance(pl_module, AlignmentModule)
        if self.every and trainer.loggers:
            pl_module.watched = {}

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What has been watched, and watch no longer."""
        assert isinstance(pl_module, AlignmentModule)
        watched, pl_module.watched = pl_module.watched or {}, None
        for name, kept in watched.items() if trainer.is_global_zero else ():
            values = torch.cat(kept).numpy()
            for logger in trainer.loggers:
                show_histogram(logger, f"{name}{SPREAD}", values, trainer.global_step)
