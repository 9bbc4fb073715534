"""Runs of a stage, with the losses and the first gradients of them."""

from dataclasses import replace

from lightning.pytorch.callbacks import Callback

from tests.stages import make_stage, make_trainer


class Watch(Callback):
    """Keeps the losses of optimiser steps and the gradients of the first."""

    def __init__(self):
        self.losses, self.gradients, self.micro_batches = [], None, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.micro_batches += 1
        if "train/loss" in trainer.callback_metrics:  # not before the first optimiser step
            self.losses.append(trainer.callback_metrics["train/loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def watch(stage, inputs, folder, data=None, trainer=None, **options):
    watcher = Watch()
    module, datamodule = make_stage(stage, inputs, **options)
    datamodule.batches = replace(datamodule.batches, **data or {})
    make_trainer(folder, max_epochs=1, callbacks=[watcher], **(trainer or {})).fit(module, datamodule)
    return watcher
