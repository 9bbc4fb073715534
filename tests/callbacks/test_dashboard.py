"""What the loggers are told of a run: settings beside results, and pages of curves."""

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lit_rlhf import RolloutDataModule, TextReward
from lit_rlhf.callbacks import Baseline, Dashboard
from lit_rlhf.callbacks.dashboard import FIRST_SETTINGS, flattened, settings_around
from tests.callbacks.other_logger import Other
from tests.ppo_runs import count_w9
from tests.stages import make_stage, make_trainer


def run(stage, inputs, folder, *loggers, **trainer):
    module, data = make_stage(stage, inputs)
    logger = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    options = {"max_epochs": 1, "log_every_n_steps": 1, "limit_val_batches": 1.0, "num_sanity_val_steps": -1} | trainer
    trainer = make_trainer(folder, logger=[logger, *loggers], callbacks=[Baseline(), Dashboard()], **options)
    trainer.fit(module, data)
    return trainer, EventAccumulator(str(folder)).Reload()


def hparams_of(events):
    """Settings of the session, and the columns of the experiment in their order, as the plugin reads them."""
    found = {}
    for tag, content in events.summary_metadata.items():
        if content.plugin_data.plugin_name == "hparams":
            found[tag] = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    session = found["_hparams_/session_start_info"].session_start_info.hparams
    columns = found["_hparams_/experiment"].experiment
    first = [info.name for info in columns.hparam_infos if info.differs]
    return dict(session), first, [metric.name.tag for metric in columns.metric_infos]


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_every_stage_has_its_settings_beside_metrics_that_it_logs_and_its_pages(stage, inputs, tmp_path):
    _, events = run(stage, inputs, tmp_path)
    settings, first, results = hparams_of(events)
    assert settings["learning_rate"].number_value == 1e-2
    assert settings["data/max_tokens"].number_value == (80 if stage == "ppo" else 100)
    assert settings["trainer/max_epochs"].number_value == 1
    assert "learning_rate" in first and set(first) == set(FIRST_SETTINGS)  # also those of the other stage
    scalars = set(events.Tags()["scalars"])
    logged = [tag for tag in results if tag in scalars]
    assert results[: len(logged)] == logged  # of other stages behind them
    assert logged[:2] == {"dpo": ["val/reward_accuracy", "val/reward_margin"], "ppo": ["val/score", "val/kl"]}[stage]
    assert {"train/loss"} | {tag for tag in scalars if tag.startswith("val/")} <= set(logged)
    content = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert {"Losses", "Stability"} < {page.title for page in content.category}


def test_tabs_are_written_once_and_name_no_metric_twice_however_long_the_run_is(inputs, tmp_path):
    _, events = run("sft", inputs, tmp_path, max_epochs=3)
    assert len(events.Tensors("custom_scalars__config__")) == 1


def test_rollouts_are_drawn_over_iterations_and_over_episodes_too(inputs, tmp_path):
    _, events = run("ppo", inputs, tmp_path, max_epochs=2)
    curves = {over: events.Scalars(f"{over}/score") for over in ("rollout", "over_iterations", "over_episodes")}
    assert [point.step for point in curves["over_iterations"]] == [1, 2]
    assert [point.step for point in curves["over_episodes"]] == [16, 32]
    assert len({tuple(point.value for point in points) for points in curves.values()}) == 1


def test_other_loggers_get_the_settings_of_model_data_and_trainer_in_one_config(inputs, tmp_path):
    other = Other()
    run("dpo", inputs, tmp_path, other, CSVLogger(tmp_path / "csv"))
    assert other.config["beta"] == 0.1
    assert other.config["data"]["max_tokens"] == 100 and other.config["trainer"]["max_epochs"] == 1
    steps = [step for step, metrics in other.metrics if "val/loss" in metrics]
    assert steps[0] == 0 and len(steps) == 2


class Judge:
    """A reward with a secret."""

    def __init__(self, key):
        self.key = key

    def __call__(self, prompts, responses):
        return [0.0] * len(responses)


def test_rewards_are_named_with_their_weights_and_without_what_their_objects_hold(tmp_path):
    rewards = {"right": TextReward(Judge("secret")), "form": count_w9}
    data = RolloutDataModule(rewards=rewards, reward_weights={"form": 0.5}, validation=None)
    trainer = make_trainer(tmp_path)
    trainer.datamodule = data
    settings = dict(flattened(settings_around(trainer)))
    assert settings["data/rewards/form/function"] == "tests.ppo_runs.count_w9"
    assert settings["data/rewards/form/weight"] == 0.5
    assert settings["data/rewards/right/function"] == f"{__name__}.Judge"
    assert "secret" not in str(settings)


def test_settings_are_flat_numbers_truths_and_short_text():
    nested = {"lora": None, "generation": {"seed": 0, "stop_strings": []}, "betas": (0.9, 0.95), "template": "x" * 999}
    assert dict(flattened(nested)) == {
        "lora": "None",
        "generation/seed": 0,
        "generation/stop_strings": "[]",
        "betas": "(0.9, 0.95)",
        "template": "x" * 200,
    }
