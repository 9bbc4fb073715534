"""The artefact of a run: a Hugging Face folder, whole or not there."""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError

from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.errors import UserError
from lit_rlhf.files import heal, replacing


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
            target = Path(trainer.default_root_dir) / self.folder
            heal(target)
            require_replaceable(target)

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
    try:
        with replacing(target) as aside:
            aside.mkdir()
            module.exportable().save_pretrained(aside, state_dict=weights)
            module.tokenizer.save_pretrained(aside)
    except (OSError, SafetensorError) as error:  # as a full disk is reported
        raise UserError(f"the export to {target} failed and left nothing new there: {error}") from error
