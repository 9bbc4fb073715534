"""Histograms of what the stages watch: which, when, and that nothing is kept in between."""

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf.callbacks import Histograms
from tests.stages import make_stage, make_trainer

ROLLOUT = {f"rollout/{name}" for name in ("score", "response_length", "token_kl", "advantages")}
WATCHED = {
    "sft": set(),
    "reward_model": {"train/margin", "train/score", "val/margin", "val/score"},
    "dpo": {"dpo/reward_margin", "val/reward_margin"},
    "ppo": {*ROLLOUT, "ppo/ratio"},
}


class Kept(Callback):
    """What the module keeps as each batch ends, before histograms are written."""

    def __init__(self):
        self.tensors = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.tensors.append(sum(map(len, (pl_module.watched or {}).values())))


def names(events):
    """Of the histograms; none has the tag of a scalar, which TensorBoard would then not show."""
    assert not set(events.Tags()["histograms"]) & set(events.Tags()["scalars"])
    return {tag.removesuffix("_spread") for tag in events.Tags()["histograms"]}


def run(stage, inputs, folder, every=2, **options):
    module, data = make_stage(stage, inputs)
    module.untrained = None
    logger, kept = TensorBoardLogger(folder, name="", version=""), Kept()
    callbacks = [kept, Histograms(every)]
    options = {"max_epochs": 2, "limit_val_batches": 1.0, "num_sanity_val_steps": -1} | options
    trainer = make_trainer(folder, logger=logger, callbacks=callbacks, **options)
    trainer.fit(module, data)
    assert module.watched is None
    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload(), kept.tensors, trainer


@pytest.mark.parametrize("stage", ["reward_model", "dpo"])
def test_pairs_are_shown_each_few_steps_and_at_each_validation(stage, inputs, tmp_path):
    events, _, trainer = run(stage, inputs, tmp_path)
    assert names(events) == WATCHED[stage]
    shown = {tag: events.Histograms(f"{tag}_spread") for tag in WATCHED[stage]}
    for tag, histograms in shown.items():
        if tag.startswith("val/"):
            pairs = 48 if tag.endswith("score") else 24
            assert histograms[0].step == 0 and len(histograms) == 3
            assert {h.histogram_value.num for h in histograms} == {pairs}
        else:
            assert all(step.step <= trainer.global_step for step in histograms) and histograms
    assert ("val/calibration" in events.Tags()["images"]) == (stage == "reward_model")


def test_a_rollout_is_shown_with_the_ratios_of_the_last_step_on_it(inputs, tmp_path):
    events, *_ = run("ppo", inputs, tmp_path)
    assert names(events) == WATCHED["ppo"]
    scores, ratios = events.Histograms("rollout/score_spread"), events.Histograms("ppo/ratio_spread")
    assert len(scores) == len(ratios) == 2
    assert {h.histogram_value.num for h in scores} == {16}
    tokens = events.Histograms("rollout/token_kl_spread")[0].histogram_value.num
    assert ratios[0].histogram_value.num < tokens  # of one of two minibatches
    assert not np.isclose(ratios[0].histogram_value.min, 1.0)  # the first of all ratios are 1


def test_between_histograms_and_without_a_logger_nothing_is_kept(inputs, tmp_path):
    _, kept, _ = run("dpo", inputs, tmp_path, every=1000, max_epochs=1, limit_val_batches=0)
    assert kept[0] > 0 and not any(kept[1:])  # the first step of a run is shown
    _, kept, _ = run("dpo", inputs, tmp_path / "none", every=0, max_epochs=1, limit_val_batches=0)
    assert not any(kept)
