"""The command lines of the four stages on tiny models, and what came of them."""

import json
from pathlib import Path
from typing import Any

STAGES = ("SFT", "RewardModel", "PPO", "DPO")
PREDICT = "predict"  # by the model that SFT exported
TRAINER = {
    "accelerator": "cpu",
    "enable_progress_bar": "false",
    "num_sanity_val_steps": 0,
    "default_root_dir": "run",
    "log_every_n_steps": 1,
    "max_epochs": 2,
}
SAVER = "lightning.pytorch.callbacks.ModelCheckpoint"
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"data": "lit_rlhf.SFTDataModule", "file": "sft", "model.generation.max_new_tokens": 4},
    "RewardModel": {"data": "lit_rlhf.PreferenceDataModule", "file": "preference"},
    "DPO": {
        "data": "lit_rlhf.PreferenceDataModule",
        "file": "preference",
        "model.cache_reference": "true",
        "model.generation.max_new_tokens": 4,
    },
    "PPO": {
        "data": "lit_rlhf.RolloutDataModule",
        "file": "prompts",
        "model.num_minibatches": 2,
        "model.ppo_epochs": 1,
        "data.reward": "lit_rlhf.TextReward",
        "data.reward.function": "tests.stages.share_of_w9",
        "data.rollout_size": 8,
        "data.num_slots": 4,
        "data.max_new_tokens": 6,
        "trainer.max_epochs": 5,
    },
}


def arguments(stage: str, inputs: Path, **more: Any) -> list[str]:
    """The command line that fits a stage on the inputs of `tests.stages`, or predicts with what one has exported."""
    predicts = stage == PREDICT
    options = dict(OPTIONS["SFT" if predicts else stage])
    file = f"{inputs}/{options.pop('file')}.jsonl"
    saver = {"class_path": SAVER, "init_args": {"save_on_train_epoch_end": stage == "PPO"}}
    named = {
        **{f"trainer.{name}": value for name, value in TRAINER.items()},
        "trainer.callbacks": json.dumps([saver]),
        "model": f"lit_rlhf.{'SFT' if predicts else stage}",
        "model.policy": inputs / ("exported-SFT" if predicts else "model"),
        "model.learning_rate": 0.01,
        "data": options.pop("data"),
        "data.train": file,
        "data.validation": file,
        **({} if stage == "PPO" else {"data.batch_size": 4, "trainer.val_check_interval": 2}),
        **options,
        **more,
    }
    return ["predict" if predicts else "fit", *(f"--{name}={value}" for name, value in named.items())]


def sizes(folder: Path) -> list[int]:
    """Bytes of each file that a run wrote."""
    return [path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()]
