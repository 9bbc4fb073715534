"""Alarms while a run goes on: each is told once, of the metrics as they stand, and off by one flag."""

from types import SimpleNamespace

import pytest
import torch

from lit_rlhf.callbacks import Alarms


def watched(metrics, **options):
    """Show a callback these metrics at the end of one epoch after the other."""
    callback = Alarms(**options)
    for step, value in enumerate(metrics):
        shown = {name: torch.tensor(float(number)) for name, number in value.items()}
        trainer = SimpleNamespace(callback_metrics=shown, global_step=step, is_global_zero=True, sanity_checking=False)
        callback.on_train_epoch_end(trainer, None)
        callback.on_validation_end(trainer, None)
    return callback


def test_what_goes_wrong_is_told_once_with_what_helps():
    with pytest.warns(UserWarning) as told:
        watched([{"rollout/kl": 50 + at, "val/kl": 1.0, "rollout/score": float("nan")} for at in range(8)])
    (warning,) = told
    assert "KL beyond budget: rollout/kl is 52, above 40, since step 0. Raise model.kl.kl_coef" in str(warning.message)


def test_metrics_of_validation_are_taken_when_they_are_new(recwarn):
    callback = watched([{"rollout/kl": 1.0, "val/kl": 2.0}] * 3)
    assert callback.curves["val/kl"].steps == callback.curves["rollout/kl"].steps == [0, 1, 2]
    assert not list(recwarn)


def test_they_are_off_by_one_flag(recwarn):
    watched([{"rollout/kl": 50.0}] * 8, watch=False)
    assert not list(recwarn)
