"""The validation before the first step: what it logs, and that it changes nothing."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lit_rlhf.callbacks import Baseline
from tests.callbacks.other_logger import Other
from tests.stages import make_stage, make_trainer


class Watched(Baseline):
    """Keeps the learning of a run: its losses."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def run(stage, inputs, folder, steps=-1, **options):
    """Train; the callback, and the steps and metrics of each validation."""
    module, data = make_stage(stage, inputs)
    watched, logger = Watched(), Other()
    callbacks = [watched, *options.pop("callbacks", ())]
    settings = {"max_epochs": 1, "limit_val_batches": 1.0, "log_every_n_steps": 1} | options
    trainer = make_trainer(folder, logger=logger, callbacks=callbacks, num_sanity_val_steps=steps, **settings)
    trainer.fit(module, data)
    return watched, [(step, row) for step, row in logger.metrics if any(name.startswith("val/") for name in row)]


@pytest.mark.parametrize("stage", ["reward_model", "ppo"])
def test_it_logs_at_step_0_and_training_is_the_same_to_the_bit(stage, inputs, tmp_path):
    torch.manual_seed(0)
    with_it, rows = run(stage, inputs, tmp_path / "with")
    torch.manual_seed(0)
    without, others = run(stage, inputs, tmp_path / "without", steps=0)
    assert with_it.losses == without.losses
    (step, first), *after = rows
    assert step == 0 and first.keys() == others[0][1].keys()
    assert after == others


def test_it_is_what_validate_finds(inputs, tmp_path):
    module, data = make_stage("dpo", inputs)
    measured = make_trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)[0]
    _, rows = run("dpo", inputs, tmp_path)
    assert rows[0][1] == pytest.approx(measured | {"epoch": 0}, rel=1e-6)


def test_a_sanity_check_of_a_part_is_no_baseline(inputs, tmp_path):
    watched, rows = run("sft", inputs, tmp_path, steps=1)
    assert watched.metrics and len(rows) == 1 and rows[0][0] > 0


def test_neither_a_checkpoint_nor_early_stopping_counts_it(inputs, tmp_path):
    stopping = EarlyStopping("val/loss", patience=1, mode="max")  # the loss falls: a baseline would be the best
    keeping = ModelCheckpoint(tmp_path / "kept", monitor="val/loss", mode="max")
    run("sft", inputs, tmp_path, callbacks=[stopping, keeping], enable_checkpointing=True, max_epochs=2)
    assert stopping.stopped_epoch == 1 and stopping.wait_count == 1  # a worse one than the first, and no more
    assert "step=0" not in keeping.best_model_path and keeping.best_model_path
