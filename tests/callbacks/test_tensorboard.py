"""What a run writes into TensorBoard: the tags of each stage, and what a training metric is a mean over."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.stages import STAGES, make_stage, make_trainer

STEP = {"epoch", "train/loss", "train/grad_norm", "train/learning_rate"}
IMPLICIT = {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward", "chosen_logprobs"}
IMPLICIT |= {"rejected_logprobs"}
PAIRS = {"train/chosen_length", "train/rejected_length"}
EPISODES = {"score", "kl", "response_length", "eos_fraction", "repeated_fraction"}
LEARNING = {"policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio", "explained_variance"}
CLASSES = {f"{name}_{what}" for name in ("desirable", "undesirable") for what in ("reward", "logprobs", "length")}
TAGS = {
    "kto": STEP
    | {f"{prefix}/{name}" for prefix in ("kto", "val") for name in CLASSES | {"kl", "reward_margin"}}
    | {"val/loss"},
    "sft": STEP | {"train/response_length", "val/loss"},
    "reward_model": STEP
    | PAIRS
    | {"train/accuracy", "train/margin"}
    | {f"val/{name}" for name in ("loss", "accuracy", "margin", "confidence", "calibration_error")},
    "dpo": STEP | PAIRS | {f"{prefix}/{name}" for prefix in ("dpo", "val") for name in IMPLICIT} | {"val/loss"},
    "ppo": STEP
    | {f"ppo/{name}" for name in LEARNING}
    | {f"{prefix}/{name}" for prefix in ("rollout", "val") for name in EPISODES}
    | {f"rollout/{name}" for name in ("shaped_score", "sampler_gap", "kl_coef", "entropy")},
}


def events(folder, stage, inputs, trainer, **options):
    """Train for an epoch, validating before and after; the scalars by tag, and the first validation."""
    module, data = make_stage(stage, inputs, **options)
    module.untrained = None  # a head just drawn is measured all the same
    logger = TensorBoardLogger(folder, name="", version="")
    trainer = make_trainer(folder, logger=logger, max_epochs=1, log_every_n_steps=1, limit_val_batches=1.0, **trainer)
    before = trainer.validate(module, data, verbose=False)[0] if stage != "ppo" else {}
    trainer.fit(module, data)
    read = EventAccumulator(str(folder)).Reload()
    return {tag: [event.value for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}, before


@pytest.mark.parametrize("stage", [*STAGES, "kto"])
def test_each_stage_writes_these_tags_and_no_others(stage, inputs, tmp_path):
    scalars, _ = events(tmp_path, stage, inputs, {})
    assert set(scalars) - {"hp_metric"} == TAGS[stage]


@pytest.mark.parametrize(
    ("stage", "options"),
    [("sft", {}), ("reward_model", {"normalize": None}), ("dpo", {"reference_free": True}), ("kto", {})],
)
def test_a_training_metric_is_the_mean_over_the_optimiser_step(stage, options, inputs, tmp_path):
    # Accumulation takes the whole data set into one step, so it shows what validation on the same data has just found.
    scalars, before = events(tmp_path, stage, inputs, {"accumulate_grad_batches": 100}, **options)
    assert len(scalars["train/loss"]) == 1
    shared = {name.partition("/")[2]: value for name, value in before.items()}
    shown = {tag.partition("/")[2]: values[0] for tag, values in scalars.items() if not tag.startswith("val/")}
    compared = shared.keys() & shown.keys()
    assert len(compared) == {"sft": 1, "reward_model": 3, "dpo": 7, "kto": 9}[stage]
    for name in compared:
        assert shown[name] == pytest.approx(shared[name], rel=1e-5), name
