"""What a run leaves behind and shows: Hugging Face export, sample tables, completions, a summary."""

import itertools
import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.errors import UserError, require
from lit_rlhf.files import write_json, write_lines


class HuggingFaceExport(Callback):
    """Write the trained model and its tokenizer as a Hugging Face folder when `fit` ends; not after `fast_dev_run`.

    Args:
        folder: where, relative to the Trainer's `default_root_dir`, in place of an older export; null = no export.
    """

    def __init__(self, folder: str | None = "model") -> None:
        self.folder = folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the folder before an hour of training."""
        if stage == "fit" and self.folder is not None and trainer.is_global_zero:
            require_replaceable(Path(trainer.default_root_dir) / self.folder)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export on rank 0, also where a checkpoint left nothing to train; all ranks join to collect the weights."""
        if self.folder is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        assert isinstance(pl_module, AlignmentModule)
        pl_module.before_export()
        weights = full_state_dict(pl_module.exportable())
        if trainer.is_global_zero:
            target = Path(trainer.default_root_dir) / self.folder
            export(pl_module, weights, target)
            rank_zero_info(f"exported {type(pl_module).__name__} to {target}")


def require_replaceable(target: Path) -> None:
    """Refuse to replace what is no export: a model's folder, once it is written, is deleted with all that is in it.

    Raises:
        UserError: a file, or a folder that holds something and no config.json.
    """
    if target.is_dir() and ((target / "config.json").exists() or not any(target.iterdir())):
        return
    if target.exists():
        raise UserError(f"export.folder: {target} is there and no export of a model; name a folder of its own")


def export(module: AlignmentModule, weights: dict[str, torch.Tensor], target: Path) -> None:
    """Write a Hugging Face folder aside and rename it into place: a reader never meets half of one.

    Args:
        module: knows the model and the tokenizer.
        weights: whole state dict of `module.exportable()`.
        target: the folder; one that is there is replaced.

    Raises:
        UserError: the disk is full or may not be written to, or something else than an export is there; nothing is left
            behind, an older export stays.
    """
    require_replaceable(target)
    aside, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        module.exportable().save_pretrained(aside, state_dict=weights)
        module.tokenizer.save_pretrained(aside)
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        aside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError | SafetensorError):  # as a full disk is reported
            raise UserError(f"the export to {target} failed and left nothing new there: {error}") from error
        raise


class SampleTable(Callback):
    """Show prompts, completions and scores as a table in TensorBoard at each validation.

    Args:
        num_prompts: rows of the table; 0 = none.
    """

    def __init__(self, num_prompts: int = 8) -> None:
        require(num_prompts >= 0, "num_prompts", num_prompts, "0 or more")
        self.num_prompts = num_prompts

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table; all ranks complete the prompts, since sharded weights need them all."""
        assert isinstance(pl_module, AlignmentModule)
        data: Any = getattr(trainer, "datamodule", None)
        if self.num_prompts == 0 or trainer.sanity_checking or not hasattr(data, "sample_prompts"):
            return
        prompts = data.sample_prompts(self.num_prompts)
        rows = [] if prompts is None else pl_module.sample_table(prompts)
        for logger in trainer.loggers:
            if rows and isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("samples", markdown_table(rows), trainer.global_step)


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as Markdown, a column for each of prompt and completion and one for all that is short.

    TensorBoard breaks a narrow column within its words and numbers.
    """

    def cell(value: Any) -> str:
        text = f"{value:.2f}" if isinstance(value, float) else str(value)
        return text.replace("|", "\\|").replace("\n", "<br>")

    def cells(row: dict[str, Any]) -> list[str]:
        short = [f"{name}: {cell(value)}" for name, value in row.items() if name not in ("prompt", "completion")]
        return [cell(row["prompt"]), cell(row["completion"]), "<br>".join(short)]

    lines = ["| prompt | completion | outcome |", "| --- | --- | --- |"]
    return "\n".join(lines + ["| " + " | ".join(cells(row)) + " |" for row in rows])


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


class CompletionWriter(BasePredictionWriter):
    """Write what `predict` made as JSON Lines, in the order of the prompts.

    Args:
        file: where, relative to the Trainer's `default_root_dir`.
    """

    def __init__(self, file: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="epoch")
        self.file = file

    def write_on_epoch_end(
        self, trainer: Trainer, pl_module: LightningModule, predictions: Sequence[Any], batch_indices: Sequence[Any]
    ) -> None:
        """Collect the rows of all ranks and write them aside, then rename."""
        mine = list(predictions)
        ranks: list[list[Any]] = [mine] * trainer.world_size
        if dist.is_available() and dist.is_initialized():
            dist.all_gather_object(ranks, mine)
        if trainer.is_global_zero:
            # The k-th batch of rank r among n is batch k n + r of the data.
            batches = [batch for kth in itertools.zip_longest(*ranks, fillvalue=()) for batch in kth]
            rows = [row for batch in batches for row in batch]
            target = Path(trainer.default_root_dir) / self.file
            write_lines((json.dumps(row, ensure_ascii=False, default=str) for row in rows), target)
            rank_zero_info(f"wrote {len(rows)} rows to {target}")
