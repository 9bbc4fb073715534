"""Run by `test_strategies.py` under torchrun: all four stages a few steps under one strategy; prints JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.sharding import full_state_dict
from tests.stages import STAGES, make_stage


def main(folder: Path, name: str) -> None:
    """Fit each stage; rank 0 prints what came out."""
    results: dict[str, Any] = {}
    for stage in (*STAGES, "dpo_cached"):
        strategy: Any = "ddp" if name == "ddp" else ModelParallelStrategy(process_group_backend="gloo")
        options = {"cache_reference": True} if stage == "dpo_cached" else {}
        module, data = make_stage(stage.removesuffix("_cached"), folder, **options)
        trainer = Trainer(
            default_root_dir=folder / name / stage,
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            max_epochs=2,
            callbacks=[HuggingFaceExport()],
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
        )
        trainer.fit(module, data)
        metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
        weights = full_state_dict(module.exportable())
        checksum = torch.tensor(sum(float(w.double().abs().sum()) for w in weights.values()))
        results[stage] = {"metrics": metrics, "steps": trainer.global_step, "checksum": float(checksum)}
    if trainer.is_global_zero:
        (folder / f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
