"""How weights move: clipping, schedules, and steps that are not taken."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf import UserError
from lit_rlhf.engine.sharding import total_norm
from tests.ppo_runs import make
from tests.stages import make_stage, make_trainer


class ClippedNorms(Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(total_norm([p.grad for p in pl_module.parameters() if p.grad is not None]).item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision, inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    clipped = ClippedNorms()
    make_trainer(tmp_path, max_steps=2, precision=precision, gradient_clip_val=0.01, callbacks=[clipped]).fit(
        module, data
    )
    assert clipped.norms == pytest.approx([0.01, 0.01], rel=1e-3)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path)
    before = module.policy.head.weight.clone()
    module.policy.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match="no step was taken"):
        trainer.fit(module, data)
    assert torch.equal(module.policy.head.weight, before)


def test_a_module_whose_weights_are_all_frozen_is_refused(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    module.requires_grad_(False)
    with pytest.raises(UserError, match="all weights are frozen"):
        make_trainer(tmp_path, max_steps=1).fit(module, data)


def test_a_warm_up_that_lasts_longer_than_the_run_is_told(inputs, tmp_path, caplog):
    module, data = make_stage("sft", inputs, warmup_steps=1000)
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, max_steps=2).fit(module, data)
    assert "warmup_steps (1000) is all of the 2 steps: learning_rate is never reached" in caplog.text


def test_a_short_run_with_a_warm_up_is_told_that_its_first_step_moves_nothing(inputs, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_rlhf.algorithms.learning.rank_zero_info", said.append)
    for warmup in (0, 1):
        module, data = make_stage("sft", inputs, warmup_steps=warmup)
        make_trainer(tmp_path, max_steps=2).fit(module, data)
    assert said == ["warmup_steps: the rate begins at 0, so that the first of the 2 steps moves nothing"]
