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
from lit_rlhf.callbacks.closing import say_closing
from lit_rlhf.errors import damaged, require_alike
from lit_rlhf.files import write_json


class RunSummary(Callback):
    """Write summary.json into the run's folder when `fit` ends: time, peak memory, models held, last metrics.

    And say in a panel, or in lines where no terminal draws one, what was achieved, where it is, and what comes next.

    A summary stays where nothing more was trained; `fast_dev_run` writes none. Time and metrics of a resumed run are
    those of all its parts, up to the checkpoints.
    """

    def __init__(self) -> None:
        self.seconds_before = 0.0  # of the parts before a resume
        self.metrics_before: dict[str, float] = {}
        self.since = time.perf_counter()
        self.trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self.since = time.perf_counter()
        self.trained = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """There is something to train."""
        self.trained = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Time and metrics so far."""
        checkpoint["summary"] = {"seconds": self.seconds(), "metrics": self.metrics(trainer)}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on from those of a checkpoint."""
        state = checkpoint.get("summary", {"seconds": 0.0, "metrics": {}})  # none of a run without this callback
        name = damaged(trainer.ckpt_path, "summary")
        require_alike(state, {"seconds": 0.0, "metrics": {}}, name, ("seconds", "metrics"))
        self.seconds_before, self.metrics_before = state["seconds"], state["metrics"]

    def seconds(self) -> float:
        """Time of all parts."""
        return self.seconds_before + time.perf_counter() - self.since

    def metrics(self, trainer: Trainer) -> dict[str, float]:
        """Last value of each metric of all parts."""
        return self.metrics_before | {name: float(value) for name, value in trainer.callback_metrics.items()}

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the summary."""
        file = Path(trainer.default_root_dir) / "summary.json"
        told = file.exists() and not self.trained
        if not trainer.is_global_zero or told or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, AlignmentModule)
        data: Any = getattr(trainer, "datamodule", None)
        reward_networks = list(data.rewards.networks()) if hasattr(data, "rewards") else []
        seconds, metrics = self.seconds(), self.metrics(trainer)
        summary = {
            "seconds": seconds,
            "peak_memory_mb": peak_memory_mb(pl_module.device),
            "models_in_memory": len(list(pl_module.networks())) + len(reward_networks),
            "steps": trainer.global_step,
            "metrics": metrics,
        }
        write_json(summary, file)
        say_closing(trainer, pl_module, metrics, seconds)


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: on the GPU as the allocator counts, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
