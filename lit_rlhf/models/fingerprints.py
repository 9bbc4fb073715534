"""Fingerprints of weights: whether a folder still holds those that were read from it once.

A run keeps what learns. What it stands on (a frozen base, a reference, a reward model) stays in folders, and the next
run of their stage replaces them.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from transformers.utils import cached_file

from lit_rlhf.engine.memory import only_shapes
from lit_rlhf.errors import UserError, damaged, require_alike

Fingerprints = dict[str, str]  # folder or hub name -> fingerprint of the weights there
INDEX = "model.safetensors.index.json"
SINCE = "it was trained anew or replaced since"


def fingerprint(source: str) -> str | None:
    """Hash of names, dtypes, shapes and numbers of the weights in a folder, or in the hub's cache of a name.

    The same weights in other files, dealt out otherwise, or written at another time, have the same.

    Args:
        source: see `hub.resolve`; of a model, or of an adapter.

    Returns:
        None where there are no weights, or none are read.
    """
    if only_shapes():
        return None
    digest, found = xxhash.xxh3_128(), [line for file in weight_files(source) for line in tensors_in(file)]
    for line in sorted(found):
        digest.update(line)
    return digest.hexdigest() if found else None


def fingerprints(sources: Iterable[str]) -> Fingerprints:
    """Those of several, without those that hold no weights."""
    held = {source: fingerprint(source) for source in sources}
    return {source: mark for source, mark in held.items() if mark is not None}


def weight_files(source: str, local: bool = True) -> list[Path]:
    """The files that a model is read from, or an adapter where there is no model.

    Args:
        source: folder or hub name.
        local: of a name, look into the hub's cache alone.
    """
    if whole := found_file(source, "model.safetensors", local):
        return [whole]
    if index := found_file(source, INDEX, local):
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        return [file for name in names if (file := found_file(source, name, local))]
    return [own] if (own := found_file(source, "adapter_model.safetensors", local)) else []


def found_file(source: str, name: str, local: bool = True) -> Path | None:
    """A file of a folder, or of the hub's cache."""
    with suppress(OSError):  # no such folder any more
        file = cached_file(source, name, local_files_only=local, _raise_exceptions_for_missing_entries=False)
        return None if file is None else Path(file)
    return None


def tensors_in(file: Path) -> tuple[bytes, ...]:
    """A line for each tensor; a file that is as it was is not read again."""
    about = file.stat()
    return _tensors_in(file.resolve(), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=256)
def _tensors_in(file: Path, *about: int) -> tuple[bytes, ...]:
    lines = []
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118
            tensor = opened.get_tensor(name)  # a view of the file: one at a time is in memory
            held = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            lines.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {xxhash.xxh3_128_hexdigest(held)}\n".encode())
    return tuple(lines)


def require_same(
    given: Mapping[str, Fingerprints],
    mine: Mapping[str, Fingerprints],
    adapter: str = "",
    file: str = "the checkpoint",
) -> None:
    """Refuse to go on from a checkpoint on other weights than it stood on.

    Args:
        given: by role, what the run of the checkpoint stood on.
        mine: what this one does; a role that it has not, or keeps in its checkpoints, is not looked at.
        adapter: the role that is of no use without these weights, since an adapter on them is all that has learnt.
        file: of the checkpoint.

    Raises:
        UserError: says which folder, and what to do.
    """
    name = damaged(file, "stands_on")
    require_alike(given, {}, name)
    require_alike(given, {role: {} for role in given}, name)
    for role in sorted(given.keys() & mine.keys()):
        require_alike(given[role], dict.fromkeys(given[role], ""), f"{name}[{role!r}]")
        lost = [folder for folder, mark in given[role].items() if mark not in mine[role].values()]
        known = given[role] or given.get(adapter, {})  # one on the adapter's base names none
        new = [folder for folder, mark in mine[role].items() if mark not in known.values()]
        if not lost and known and new:
            raise UserError(
                f"ckpt_path: the {role} of its run did not stand on {new[0]}, and this run's does: give the model "
                "settings of its run, or start a new run from what lit-rlhf export makes of the checkpoint"
            )
        if not lost:
            continue
        if lost[0] in new or not new:
            what = f"{lost[0]}, which the {role} of its run stood on, holds other weights now: {SINCE}"
        else:
            what = f"the {role} of its run stood on {lost[0]}, and {new[0]} holds other weights"
        other = "; the adapter in the checkpoint is of no use without them"
        if role != adapter:
            other = ", or start a new run from what lit-rlhf export makes of the checkpoint"
        raise UserError(f"ckpt_path: {what}. Put the old weights back{other}")
