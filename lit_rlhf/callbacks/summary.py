"""What a run came to: time, peak memory, models held, last metrics."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.files import write_json


class RunSummary(Callback):
    """Write summary.json into the run's folder when `fit` ends: time, peak memory, models held, last metrics.

    Nothing is written where nothing was trained, nor after `fast_dev_run`. The time of a resumed run is that of all its
    parts, up to the checkpoints.
    """

    def __init__(self) -> None:
        self.seconds_before = 0.0  # of the parts before a resume
        self.since = time.perf_counter()
        self.trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.since = time.perf_counter()
        self.trained = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There is something to train."""
        self.trained = True

    def state_dict(self) -> dict[str, Any]:
        """The time so far."""
        return {"seconds": self.seconds_before + time.perf_counter() - self.since}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the time of a checkpoint."""
        self.seconds_before = state_dict["seconds"]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary."""
        if not trainer.is_global_zero or not self.trained or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, AlignmentModule)
        data: Any = getattr(trainer, "datamodule", None)
        rewards = [data.reward, *data.monitors.values()] if hasattr(data, "monitors") else []
        reward_networks = [network for reward in rewards for network in reward.networks()]
        summary = {
            "seconds": self.state_dict()["seconds"],
            "peak_memory_mb": peak_memory_mb(pl_module.device),
            "models_in_memory": len(list(pl_module.networks())) + len(reward_networks),
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        }
        write_json(summary, Path(trainer.default_root_dir) / "summary.json")


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: on the GPU as the allocator counts, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
