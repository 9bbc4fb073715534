"""What a checkpoint holds, read without the run that wrote it."""

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as sharded
from lightning.fabric.utilities.rank_zero import rank_zero_only
from torch import Tensor

from lit_rlhf.errors import UserError, one_line, require

DEEPSPEED = Path("checkpoint", "mp_rank_00_model_states.pt")  # where it keeps weights, and what Lightning hands it
META = "meta.pt"  # where Lightning keeps all but tensors beside sharded ones
SHARDED = (".metadata", META)  # what a folder of sharded weights gets last, from torch and from Lightning
VERSION = "pytorch-lightning_version"


def otherwise(path: Path) -> str:
    """What to say of a file or a folder that is no checkpoint, and what to name in its place."""
    said = "is no checkpoint of the Trainer's, such as a run keeps under its default_root_dir"
    if (path / "config.json").is_file() or path.suffix in (".safetensors", ".bin"):
        return f"{said}; an exported model is named by model.policy, and of lit-rlhf export by --model"
    kept = [file for file in path.rglob("*.ckpt") if file.exists()] if path.is_dir() else []
    if newest := max(kept, key=lambda file: file.stat().st_mtime, default=None):
        return f"{said}; the newest of those in this folder is {newest}"
    return said if path.is_dir() and path.suffix != ".ckpt" else f"{said}. Or it was cut short: then take an older one"


def read_facts(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint holds, tensors without their values.

    Args:
        path: a file of torch's, or the folder of a sharded checkpoint, which has no `state_dict` here.
    """
    path = Path(path)
    file = path / (DEEPSPEED if is_deepspeeds(path) else META) if path.is_dir() else path
    facts: dict[str, Any] = torch.load(file, weights_only=True, mmap=True, map_location="meta")
    return facts


def is_deepspeeds(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed's, which was written to its end."""
    return (folder / DEEPSPEED).is_file() and (folder / "latest").is_file()


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a checkpoint of sharded weights, or of DeepSpeed's, that was written to its end."""
    return all((folder / name).is_file() for name in SHARDED) or is_deepspeeds(folder)


def checked_facts(path: Path, option: str) -> dict[str, Any]:
    """As `read_facts`, of what may be any file: its parts are held against the sums that the archive has of them.

    Args:
        path: one of torch's archives.
        option: that names it.

    Raises:
        UserError: nothing is there, or no checkpoint of the Trainer's, or a damaged one.
    """
    file = path.absolute()
    if not path.exists():
        raise UserError(f"{option}: there is no checkpoint {file}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{option}: {file} may not be read")
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise UserError(f"{option}: {file} {otherwise(path)}")
    broken = f"{option}: {file} is damaged, or holds more than tensors and plain values; take an older one"
    checks = getattr(rank_zero_only, "rank", 0) == 0  # the sums take reading all of it; one rank is enough
    try:
        if checks and zipfile.ZipFile(path).testzip() is not None:
            raise UserError(broken)
        facts = read_facts(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:  # as torch and Python report
        raise UserError(broken) from error
    if not isinstance(facts, dict) or VERSION not in facts:
        raise UserError(f"{option}: {file} {otherwise(path)}")
    return facts


def require_facts(path: Path, algorithm: str) -> dict[str, Any]:
    """As `checked_facts`, of this algorithm.

    Raises:
        UserError: it is another's, sharded or none.
    """
    if is_deepspeeds(path):
        ours = f"lit-rlhf export --ckpt_path={path} --folder=model"
        raise UserError(f"checkpoint_path: {path.absolute()} is of DeepSpeed: have its model written by {ours}")
    if is_sharded(path):
        join = f"python -m lightning.pytorch.utilities.consolidate_checkpoint {path}"
        raise UserError(f"checkpoint_path: {path.absolute()} is a sharded checkpoint: make one file of it by {join}")
    facts = checked_facts(path, "checkpoint_path")
    theirs = facts.get("algorithm", algorithm)
    if theirs != algorithm:
        raise UserError(f"{path} is a checkpoint of {theirs}: load it by {theirs}.load_from_checkpoint")
    for key in ("state_dict", "hyper_parameters"):
        if not isinstance(facts.get(key, {}), Mapping):
            raise UserError(
                f"checkpoint_path: {path.absolute()} is damaged: its {key} is no mapping; take an older one"
            )
    return facts


def require_location(map_location: Any) -> None:
    """Refuse a place that tensors cannot be loaded to, or would have no numbers in.

    Args:
        map_location: as in `torch.load`.

    Raises:
        UserError: torch knows no such place, or it is the meta device.
    """
    archive = io.BytesIO()
    torch.save(torch.zeros(1), archive)
    archive.seek(0)
    try:
        placed = torch.load(archive, weights_only=True, map_location=map_location)
    except (RuntimeError, TypeError) as error:
        raise UserError(f"map_location ({one_line(map_location)}) cannot be loaded to: {one_line(error)}") from error
    require(not placed.is_meta, "map_location", map_location, "a device that holds numbers, such as cpu")


def read_weights(path: str | Path, network: str) -> dict[str, Tensor]:
    """State dict of the Hugging Face model within one network, on the CPU.

    Args:
        path: as in `read_facts`.
        network: its name in the module, such as "policy".
    """
    path, prefix = Path(path), f"{network}.model."
    if path.is_dir() and not is_deepspeeds(path):
        key = f"state_dict.{prefix}"
        stored = sharded.FileSystemReader(path).read_metadata().state_dict_metadata
        weights = {
            name.removeprefix(key): torch.empty(about.size, dtype=about.properties.dtype)  # type: ignore[union-attr]
            for name, about in stored.items()
            if name.startswith(key)
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # this process reads by itself
            sharded.load({f"{key}{name}": tensor for name, tensor in weights.items()}, checkpoint_id=path, no_dist=True)
        return weights
    file, key = (path / DEEPSPEED, "module") if path.is_dir() else (path, "state_dict")
    state = torch.load(file, weights_only=True, mmap=True, map_location="cpu")[key]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
