"""Runs of DPO, with each batch and its loss."""

from lightning.pytorch.callbacks import Callback

from tests.stages import make_stage, make_trainer


class Watch(Callback):
    """Keeps each batch and its loss."""

    def __init__(self):
        self.losses, self.batches = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.batches.append(batch)


def fit(inputs, folder, max_steps=3, **options):
    module, data = make_stage("dpo", inputs, warmup_steps=0, **options)
    watch = Watch()
    make_trainer(folder, max_epochs=1, max_steps=max_steps, callbacks=[watch]).fit(module, data)
    return module, watch
