"""Checkpoints that are whole or not there, and clear words about those that are not."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.errors import UserError
from lit_rlhf.files import replacing


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's single-file checkpoints, written aside and renamed: a full disk leaves no truncated one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; a remote address is left to Lightning.

        Raises:
            OSError: the disk is full or may not be written to; nothing is left behind, an older checkpoint stays.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        with replacing(Path(path)) as aside:
            super().save_checkpoint(checkpoint, aside, storage_options)


def choose_checkpoint(name: str, root: Path, training: bool) -> str:
    """The checkpoint that `ckpt_path` means, found in order; "last" is the newest of the run.

    Args:
        name: a path, "last", or Lightning's "hpc", which it finds itself.
        root: the run's folder.
        training: whether training is to go on.

    Raises:
        UserError: there is none, or one that cannot be gone on from.
    """
    if name == "best":
        raise UserError("ckpt_path: best is known to the run that found it alone; name its file")
    if name == "last":  # Lightning would start anew where it finds none, and replace the export
        newest = newest_checkpoint(root)
        if newest is None:
            raise UserError(f"ckpt_path: there is no checkpoint under {root.absolute()}")
        rank_zero_info(f"ckpt_path last is {newest}")
        name = str(newest)
    if name != "hpc":
        require_checkpoint(Path(name), training)
    return name


def newest_checkpoint(root: Path) -> Path | None:
    """The checkpoint that was written last under a run's folder, if any."""
    found = [path for path in root.rglob("*.ckpt") if not path.name.startswith(".")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def require_checkpoint(path: Path, training: bool = False) -> None:
    """Refuse, before models and data are read, what the Trainer could not go on from; tensors are not read.

    Args:
        path: one of torch's archives, or a folder of sharded weights, which is taken as it is.
        training: whether training is to go on, which takes more than weights.

    Raises:
        UserError: nothing is there, or an exported model, weights alone, or a damaged file.
    """
    not_ours = (
        f"ckpt_path: {path.absolute()} is no checkpoint of the Trainer's, such as a run keeps under its "
        "default_root_dir; an exported model is named by model.policy"
    )
    if not path.exists():
        raise UserError(f"ckpt_path: there is no checkpoint {path.absolute()}")
    if path.is_dir():
        if (path / "config.json").exists():
            raise UserError(not_ours)
        return
    if not zipfile.is_zipfile(path):
        raise UserError(f"{not_ours}. Or it was cut short: then take an older one")
    try:
        checkpoint = torch.load(path, weights_only=True, mmap=True, map_location="meta")
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:  # as torch reports a damaged archive
        raise UserError(
            f"ckpt_path: {path.absolute()} is damaged, or holds more than tensors and plain values; take an older one"
        ) from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "loops"} <= checkpoint.keys():
        raise UserError(not_ours)
    if training and "optimizer_states" not in checkpoint:
        raise UserError(
            f"ckpt_path: {path.absolute()} holds weights alone (save_weights_only), so no training can go on from it"
        )
