"""Run by `test_deepspeed.py`: stages under DDP and under ZeRO-2 on two ranks and CPUs; writes what came out.

Lightning lets DeepSpeed run on CUDA alone, though it has a backend for CPUs; that check is what `OnCPU` leaves out.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_rlhf import LoRA
from lit_rlhf.callbacks import HuggingFaceExport
from tests.forked_ranks import in_two_ranks
from tests.stages import make_stage
from tests.strategy_script import WHOLE

CLIPPED = {"gradient_clip_val": 0.1}
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # stage, options of the module and of the Trainer
    "sft": ("sft", WHOLE, CLIPPED),
    "reward_model": ("reward_model", WHOLE, {}),
    "dpo": ("dpo", WHOLE, {}),
    "ppo": ("ppo", {}, {}),
    "lora_ppo": ("ppo", {"lora": LoRA(r=4)}, {}),
    "mixed_dpo": ("dpo", WHOLE, {"precision": "bf16-mixed"}),
}


class OnCPU(DeepSpeedStrategy):
    """ZeRO over gloo."""

    def setup_environment(self) -> None:
        """As Lightning's, but for what is asked of the accelerator and of its indices."""
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        """With an index, which DeepSpeed asks for."""
        return torch.device("cpu", 0)


def trainer_for(strategy: Any, folder: Path, **options: Any) -> Trainer:
    """A quiet one."""
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        callbacks=[HuggingFaceExport(), ModelCheckpoint(filename="{epoch}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        logger=False,
        **{"max_epochs": 2, **options},
    )


def zero2() -> OnCPU:
    """ZeRO-2."""
    return OnCPU(stage=2, process_group_backend="gloo")


def fit(name: str, strategy: Any, folder: Path, ckpt_path: str | None = None) -> dict[str, Any]:
    """The weights of a run, and the norm of its last gradient."""
    stage, options, more = RUNS[name]
    seed_everything(0, verbose=False)
    module, data = make_stage(stage, folder, **options)
    trainer = trainer_for(strategy, folder / ("ddp" if strategy == "ddp" else "zero") / name, **more)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    norm = float(trainer.callback_metrics["train/grad_norm"])
    return {"weights": {key: w.clone() for key, w in module.state_dict().items()}, "norm": norm}


def main(folder: Path) -> None:
    """All runs under ZeRO-2, one of them once more from its first checkpoint; then all under DDP."""
    zero = {name: fit(name, zero2(), folder) for name in RUNS}
    resumed = fit("sft", zero2(), folder, str(folder / "zero" / "sft" / "checkpoints" / "epoch=0.ckpt"))
    results: dict[str, Any] = {"resumed": apart(resumed["weights"], zero["sft"]["weights"])}
    for name in RUNS:
        ddp = fit(name, "ddp", folder)
        results[name] = {
            "apart": apart(zero[name]["weights"], ddp["weights"]),
            "norms": [zero[name]["norm"], ddp["norm"]],
        }
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(results))


def apart(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest distance of two weights."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[key].float() - theirs[key].float()).abs().max()) for key in theirs)


if __name__ == "__main__":
    sys.exit(in_two_ranks(main, Path(sys.argv[1])))
