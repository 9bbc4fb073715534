"""Checkpoints that are whole or not there, and clear words about those that are not."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.algorithms.checkpoint import VERSION, checked_facts, is_sharded, otherwise
from lit_rlhf.data.messages import describe
from lit_rlhf.errors import UserError
from lit_rlhf.files import clear, replacing

OPTIMIZERS, LOOPS = "optimizer_states", "loops"
# What every checkpoint of the Trainer's has, and what is right of it.
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    VERSION: (lambda value: isinstance(value, str) and re.match(r"\d+\.\d+", value) is not None, "a version"),
    "state_dict": (lambda value: isinstance(value, dict) and len(value) > 0, "weights by their names"),
    LOOPS: (lambda value: isinstance(value, dict), "the state of the loops"),
    "epoch": (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number from 0 on"),
    "global_step": (lambda value: type(value) is int and 0 <= value < 2**63, "a whole number from 0 on"),
}
# And what those have that training goes on from.
RESUMED: dict[str, tuple[Callable[[Any], bool], str]] = {
    OPTIMIZERS: (lambda value: _states(value), "a list of states"),
    "lr_schedulers": (lambda value: _states(value), "a list of states"),
    "callbacks": (lambda value: isinstance(value, dict), "states by callback"),
    LOOPS: (lambda value: _of_training(value.get("fit_loop")), "the state of fit_loop among others"),
}


class WholeCheckpointIO(TorchCheckpointIO):
    """Lightning's single-file checkpoints, written straight to the disk aside of their place and then renamed.

    Lightning's own hold all of it in memory a second time, and then in the system's temporary folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file; a remote address is left to Lightning.

        Raises:
            OSError: the disk is full or may not be written to; nothing is left behind, an older checkpoint stays.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        for earlier in target.parent.parent.parent.glob("version_*/checkpoints"):  # of runs that may have been killed
            clear(earlier)
        with replacing(target) as aside, aside.open("wb") as stream:
            try:
                torch.save(checkpoint, stream)
            except RuntimeError as error:  # torch says where its archive ended, not why
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def choose_checkpoint(name: str, root: Path, training: bool) -> str:
    """The checkpoint that `ckpt_path` means, found in order; "last" is the newest of the run.

    Args:
        name: a path, "last", or Lightning's "hpc", which it finds itself.
        root: the run's folder.
        training: whether training is to go on.

    Raises:
        UserError: there is none, or one that cannot be gone on from.
    """
    if "://" in name:
        raise UserError(f"ckpt_path: {name} is an address; download the file")
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
    """The whole checkpoint that was written last under a run's folder, if any."""
    found = [path for path in root.rglob("*.ckpt") if not path.name.startswith(".") and path.exists()]
    whole = [path for path in found if not path.is_dir() or is_sharded(path)]
    return max(whole, key=lambda path: path.stat().st_mtime_ns, default=None)


def require_checkpoint(path: Path, training: bool = False) -> None:
    """Refuse, before models and data are read, what the Trainer could not go on from.

    Args:
        path: one of torch's archives, or a folder of sharded weights, whose content is not looked at.
        training: whether training is to go on, which takes more than weights.

    Raises:
        UserError: nothing is there, or an exported model, weights alone, or a damaged file.
    """
    if path.is_dir() and os.access(path, os.R_OK):
        if not is_sharded(path):
            raise UserError(f"ckpt_path: {path.absolute()} {otherwise(path)}")
        return
    checkpoint = checked_facts(path, "ckpt_path")
    _require_keys(checkpoint, KEYS, path)
    if training and OPTIMIZERS not in checkpoint:
        raise UserError(
            f"ckpt_path: {path.absolute()} holds weights alone (save_weights_only), so no training can go on from it"
        )
    if training:
        _require_keys(checkpoint, RESUMED, path)


def _require_keys(
    checkpoint: Mapping[str, Any], keys: Mapping[str, tuple[Callable[[Any], bool], str]], path: Path
) -> None:
    for key, (is_right, expected) in keys.items():
        if key not in checkpoint or not is_right(checkpoint[key]):
            found = describe(checkpoint[key]) if key in checkpoint else "nothing"
            raise UserError(
                f"ckpt_path: {path.absolute()} is damaged: expected {expected} as its {key!r}, found {found}; take an "
                "older one"
            )


def _of_training(loop: Any) -> bool:
    return isinstance(loop, dict) and isinstance(loop.get("state_dict"), dict)


def _states(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(state, dict) for state in value)
