"""How many steps a resumed run comes to; `test_resume.py` has what a run that was stopped comes to, to the bit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_rlhf.algorithms.planned_steps import planned_steps
from tests.stages import make_stage, make_trainer


def trainer(batches=8, accumulate=1, max_epochs=4, max_steps=-1):
    planned = math.ceil(batches / accumulate) * max_epochs
    return SimpleNamespace(
        num_training_batches=batches,
        accumulate_grad_batches=accumulate,
        max_epochs=max_epochs,
        max_steps=max_steps,
        estimated_stepping_batches=planned if max_steps == -1 else min(planned, max_steps),
    )


def checkpoint(steps, epochs, batches=None, last=False):
    """After so many steps and whole epochs, and perhaps some micro-batches of the next."""
    under_way = {"ready": epochs + (batches is not None), "processed": epochs}
    progress = {"current": {"processed": batches or 0}, "is_last_batch": last}
    loop = {"epoch_progress": {"current": under_way}, "epoch_loop.batch_progress": progress}
    return {"global_step": steps, "loops": {"fit_loop": loop}}


@pytest.mark.parametrize(
    ("resumed", "options", "steps"),
    [
        (None, {}, 32),
        (checkpoint(16, 2), {}, 32),  # at an epoch's end
        (checkpoint(19, 2, 3), {}, 32),  # in the midst of one
        (checkpoint(24, 2, 8, last=True), {}, 32),  # in the validation at the end of one
        (checkpoint(7, 2, 3), {"accumulate": 3}, 12),  # after one step of three
        (checkpoint(6, 2), {"batches": 1}, 8),  # larger micro-batches than before
        (checkpoint(2, 2), {"batches": 3}, 8),  # smaller ones
        (checkpoint(6, 2), {"batches": 3, "accumulate": 3}, 8),
        (checkpoint(6, 2), {"max_epochs": 1}, 6),  # none is left
        (checkpoint(6, 2), {"max_steps": 10}, 10),
        (checkpoint(6, 2), {"batches": math.inf, "max_epochs": -1}, -math.inf),
    ],
)
def test_a_resumed_run_comes_to_the_steps_that_were_made_and_those_that_are_left(resumed, options, steps):
    if steps < 0:  # as long as it is let
        run = SimpleNamespace(max_epochs=-1, estimated_stepping_batches=math.inf)
        assert planned_steps(run, resumed) == math.inf
    else:
        assert planned_steps(trainer(**options), resumed) == steps


class Rates(Callback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.filterwarnings("ignore:the checkpoint comes from a run with other data")
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("before", "now"), [(40, 200), (200, 40)])
def test_the_rate_of_a_run_that_goes_on_with_other_batches_falls_to_its_end_and_no_further(
    schedule, before, now, inputs, tmp_path
):
    def fit(max_tokens, epochs, ckpt_path=None):
        module, data = make_stage("sft", inputs, lr_scheduler=schedule, warmup_steps=0)
        data.batches = replace(data.batches, max_tokens=max_tokens)
        watch = Rates()
        saver = ModelCheckpoint(tmp_path, filename="end", save_on_train_epoch_end=True)
        options = {"callbacks": [watch, saver], "enable_checkpointing": True, "max_epochs": epochs}
        run = make_trainer(tmp_path, **options)
        run.fit(module, data, ckpt_path=ckpt_path)
        return module, run, watch.rates

    fit(before, 2)
    module, run, rates = fit(now, 4, tmp_path / "end.ckpt")
    assert module.planned_steps == run.global_step
    assert rates == sorted(rates, reverse=True) and rates[-1] > 0
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)
