"""The four stages on tiny models and files, for tests that run them all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule, Trainer

from lit_rlhf import (
    CPO,
    DAPO,
    DPO,
    GRPO,
    KTO,
    ORPO,
    PPO,
    RAFT,
    REINFORCE,
    SFT,
    AdaptiveKL,
    Distillation,
    OnlineDPO,
    OnPolicyDistillation,
    PreferenceDataModule,
    ProcessRewardModel,
    ReMax,
    RewardModel,
    RolloutDataModule,
    SFTDataModule,
    SimPO,
    StepwiseDataModule,
    UnpairedDataModule,
)
from lit_rlhf.algorithms.module import AlignmentModule
from tests.tiny import VOCABULARY, save_tiny

STAGES = ("sft", "reward_model", "dpo", "ppo")
ON_POLICY = {  # a method of each kind
    "ppo": PPO,
    "reinforce": REINFORCE,
    "grpo": GRPO,
    "remax": ReMax,
    "dapo": DAPO,
    "raft": RAFT,
    "online_dpo": OnlineDPO,
    "on_policy_distillation": OnPolicyDistillation,
}
REFERENCE_FREE = {"simpo": SimPO, "cpo": CPO, "orpo": ORPO}

OFF_POLICY: dict[str, tuple[Any, str, Any]] = {  # module, file and data module
    "sft": (SFT, "sft", SFTDataModule),
    "reward_model": (RewardModel, "preference", PreferenceDataModule),
    "process_reward_model": (ProcessRewardModel, "stepwise", StepwiseDataModule),
    "dpo": (DPO, "preference", PreferenceDataModule),
    "kto": (KTO, "preference", UnpairedDataModule),
    **{name: (method, "preference", PreferenceDataModule) for name, method in REFERENCE_FREE.items()},
    "distillation": (Distillation, "sft", SFTDataModule),
}


def write_inputs(folder: Path, rows: int = 24) -> None:
    """A tiny model, a teacher, and files of each format, with texts of unequal length."""
    save_tiny(folder / "model")
    save_tiny(folder / "teacher", seed=7)
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, VOCABULARY, rng.integers(2, 9)))

    def steps() -> list[str]:
        return [text() for _ in range(rng.integers(1, 4))]

    files = {
        "sft": [{"prompt": text(), "completion": " " + text()} for _ in range(rows)],
        "preference": [{"prompt": text(), "chosen": " " + text(), "rejected": " " + text()} for _ in range(rows)],
        "prompts": [{"prompt": text()} for _ in range(rows)],
        "stepwise": [
            {"prompt": text(), "completions": (own := steps()), "labels": ["w9" not in step.split() for step in own]}
            for _ in range(rows)
        ],
    }
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def share_of_w9(prompts: list[str], responses: list[str], **columns: Any) -> list[float]:
    """A reward that a person can check."""
    return [response.split().count("w9") / max(len(response.split()), 1) for response in responses]


def make_stage(stage: str, folder: Path, **options: Any) -> tuple[AlignmentModule, LightningDataModule]:
    """Module and data of a stage; `options` go to the module."""
    model = str(folder / "model")
    options = {"learning_rate": 1e-2, "lr_scheduler": "linear", "warmup_steps": 2} | options
    if stage.endswith("distillation"):
        options = {"teacher": str(folder / "teacher")} | options
    if stage in ON_POLICY:
        kl = (
            {}
            if stage in ("online_dpo", "on_policy_distillation")
            else {"kl": AdaptiveKL(0.1, target=0.5, horizon=100)}
        )
        of_kind = {"ppo_epochs": 2, "num_minibatches": 2} | kl | options
        module: AlignmentModule = ON_POLICY[stage](model, **of_kind)
        prompts = str(folder / "prompts.jsonl")
        data: LightningDataModule = RolloutDataModule(
            share_of_w9,
            train=prompts,
            validation=prompts,
            tokenizer=module.tokenizer,
            rollout_size=16,
            num_slots=4,
            max_tokens=80,  # half of what an optimiser step can have
            max_new_tokens=8,
            group_size=1 if stage == "ppo" else 4,
        )
        return module, data
    make, name, kind = OFF_POLICY[stage]
    module, source = make(model, **options), str(folder / f"{name}.jsonl")
    return module, kind(train=source, validation=source, max_tokens=100, tokenizer=module.tokenizer)


def make_trainer(folder: Path, **options: Any) -> Trainer:
    """A quiet Trainer on the CPU."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    defaults = {"accelerator": "cpu", "enable_checkpointing": False, "limit_val_batches": 0}
    return Trainer(default_root_dir=folder, **(quiet | defaults | options))
