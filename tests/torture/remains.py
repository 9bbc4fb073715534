"""What a run left: whole or not, and its bits."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import yaml
from safetensors.torch import load_file

from lit_rlhf.cli.checkpoints import newest_checkpoint, require_checkpoint
from lit_rlhf.files import NEW, OLD

PARTS = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step")  # of a checkpoint
CLOCKS = ("perf/",)  # metrics that depend on the time


def is_aside(path: Path) -> bool:
    """Whether this is a write under way, or what a dead one left."""
    return any(part.endswith((NEW, OLD, ".incomplete")) or part.startswith("tmp") for part in path.parts)


def under(folder: Path) -> Iterator[Path]:
    """All paths in a folder, relative to it."""
    return (path.relative_to(folder) for path in sorted(folder.rglob("*")))


def leftovers(folder: Path) -> list[str]:
    """What no run will ask for any more."""
    return [str(path) for path in under(folder) if is_aside(path)]


def faults(folder: Path) -> list[str]:
    """The files that bear their names and are not whole."""
    found = []
    for path in under(folder):
        try:
            if not is_aside(path) and (folder / path).is_file():
                require_whole(folder / path)
        except Exception as error:
            found.append(f"{path}: {type(error).__name__} {error}")
    return found


def require_whole(file: Path) -> None:
    """Raise what reading a file to its end raises."""
    if file.suffix == ".ckpt":
        require_checkpoint(file, training=True)
    elif file.suffix == ".safetensors":
        load_file(file)
    elif file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".jsonl":
        [json.loads(line) for line in file.read_text().splitlines()]
    elif file.suffix == ".yaml" and file.name != "hparams.yaml":  # Lightning's, for people
        yaml.safe_load(file.read_text())
    elif file.suffix == ".arrow":
        pa.ipc.open_stream(file).read_all()
    if file.name == "config.json":  # an export is whole or not there
        missing = {"model.safetensors", "tokenizer.json"} - {path.name for path in file.parent.iterdir()}
        if missing:
            raise FileNotFoundError(f"beside it {missing}")


def steps(folder: Path) -> int:
    """What training has come to that can be gone on from: steps of the newest whole checkpoint."""
    newest = newest_checkpoint(folder / "run")
    return 0 if newest is None else int(torch.load(newest, weights_only=True)["global_step"])


def bits(folder: Path) -> dict[str, str]:
    """Hash of each part of what a finished run has come to: export, last checkpoint, steps, metrics, completions."""
    run = folder / "run"
    found = {str(path): hash_of((run / "model" / path).read_bytes()) for path in under(run / "model")}
    newest = newest_checkpoint(run)
    if newest is not None:
        checkpoint = torch.load(newest, weights_only=True)
        found |= {name: hash_of(checkpoint[name]) for name in PARTS}
    for file in run.glob("predictions.jsonl"):
        found[file.name] = hash_of(file.read_bytes())
    for file in run.glob("summary.json"):
        summary = json.loads(file.read_text())
        metrics = {name: value for name, value in summary["metrics"].items() if not name.startswith(CLOCKS)}
        found[file.name] = hash_of([summary["steps"], metrics])
    return found


def hash_of(value: Any) -> str:
    """Of tensors, bytes and plain values, to the bit."""
    digest = hashlib.sha256()
    for part in flat(value):
        digest.update(part)
    return digest.hexdigest()


def flat(value: Any) -> Iterator[bytes]:
    """The bytes that a value comes to, with marks between."""
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield np.ascontiguousarray(value.detach().flatten().view(torch.uint8).numpy()).tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield f"{key}:".encode()
            yield from flat(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield b","
            yield from flat(item)
    else:
        yield repr(value).encode()
