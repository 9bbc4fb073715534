"""What a checkpoint holds, read without the run that wrote it: facts, and the weights of one network."""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as sharded
from torch import Tensor

META = "meta.pt"  # where Lightning keeps all but tensors beside sharded ones


def read_facts(path: str | Path) -> dict[str, Any]:
    """All that a checkpoint holds, tensors without their values.

    Args:
        path: a file of torch's, or the folder of a sharded checkpoint, which has no `state_dict` here.
    """
    path = Path(path)
    file = path / META if path.is_dir() else path
    facts: dict[str, Any] = torch.load(file, weights_only=True, mmap=True, map_location="meta")
    return facts


def read_weights(path: str | Path, network: str) -> dict[str, Tensor]:
    """State dict of the Hugging Face model within one network, on the CPU.

    Args:
        path: as in `read_facts`.
        network: its name in the module, such as "policy".
    """
    path, prefix = Path(path), f"{network}.model."
    if path.is_dir():
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
    state = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["state_dict"]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
