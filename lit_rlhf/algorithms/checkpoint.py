"""What a checkpoint holds, read without the run that wrote it, and whether a run can go on from it."""

import os
import pickle
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as sharded
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_rlhf.errors import UserError, damaged, one_line, require_alike
from lit_rlhf.models.adapter_folders import Origin

DEEPSPEED = Path("checkpoint", "mp_rank_00_model_states.pt")  # where it keeps weights, and what Lightning hands it
META = "meta.pt"  # where Lightning keeps all but tensors beside sharded ones
VERSION = "pytorch-lightning_version"
CALLBACKS: dict[type[Callback], tuple[str, ...]] = {  # Lightning's that have a state, and what each must find in it
    EarlyStopping: ("wait_count", "stopped_epoch", "best_score", "patience"),
    ModelCheckpoint: ("best_model_score", "best_model_path"),
    Timer: (),
}
COMPUTES = {  # settings of an adapter, by PEFT's names, that its weights were learnt with -> our options
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "rank_pattern": "lora.rank_pattern",
    "alpha_pattern": "lora.alpha_pattern",
}
OTHERWISE = (
    "is no checkpoint of the Trainer's, such as a run keeps under its default_root_dir; an exported model is named by "
    "model.policy. Or it was cut short: then take an older one"
)


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
        raise UserError(f"{option}: {file} {OTHERWISE}")
    broken = f"{option}: {file} is damaged, or holds more than tensors and plain values; take an older one"
    checks = getattr(rank_zero_only, "rank", 0) == 0  # the sums take reading all of it; one rank is enough
    try:
        if checks and zipfile.ZipFile(path).testzip() is not None:
            raise UserError(broken)
        facts = read_facts(path)
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile) as error:  # as torch and Python report
        raise UserError(broken) from error
    if not isinstance(facts, dict) or VERSION not in facts:
        raise UserError(f"{option}: {file} {OTHERWISE}")
    return facts


def require_facts(path: Path, algorithm: str) -> dict[str, Any]:
    """As `checked_facts`, of this algorithm.

    Raises:
        UserError: it is another's, sharded or none.
    """
    if path.is_dir():
        join = "python -m lightning.pytorch.utilities.consolidate_checkpoint"
        raise UserError(f"{path.absolute()} is a sharded checkpoint: make one file of it by {join} {path}")
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


def require_same_shapes(given: Mapping[str, Any], mine: Mapping[str, Any], file: str) -> None:
    """Refuse a checkpoint whose tensors are not those of this module."""
    shapes = {name: (_shape(given, name), _shape(mine, name)) for name in sorted(given.keys() | mine.keys())}
    for name in (name for name, tensor in given.items() if isinstance(tensor, Tensor) and not has_numbers(tensor)):
        shapes[name] = (f"{given[name].layout}, {given[name].device}".removeprefix("torch."), shapes[name][1])
    differing = [f"{name} ({theirs} there, {ours} here)" for name, (theirs, ours) in shapes.items() if theirs != ours]
    if given and differing:
        raise UserError(
            f"ckpt_path: {file} is of another model, {len(differing)} tensors differ, like {differing[0]}; "
            "give the model settings of its run, or take an older checkpoint if this one was changed"
        )


def _shape(tensors: Mapping[str, Any], name: str) -> str:
    if name not in tensors:
        return "missing"
    held = tensors[name]
    if not isinstance(held, Tensor):
        return f"a {type(held).__name__}"
    kind = "" if held.is_floating_point() else f" of {held.dtype}".replace("torch.", "")  # which is made wider or not
    return f"{tuple(held.shape)}{kind}"


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds all of its numbers, in order: not sparse, not on the meta device."""
    return tensor.layout == torch.strided and not tensor.is_meta


def require_same_adapter(given: Any, mine: Origin | None, file: str) -> None:
    """Refuse a checkpoint of a run whose adapter, or the want of one, was not this one's.

    Args:
        given: the `Origin` of what had learnt in it, as a mapping.
        mine: of this run.
        file: of the checkpoint.
    """
    if given is None or mine is None:
        if given is not mine:
            theirs, ours = ("an adapter", "none") if mine is None else ("none", "an adapter")
            raise UserError(
                f"ckpt_path: the run of {file} trained {theirs}, this one trains {ours}: give model.lora and "
                "model.policy as they were in its run"
            )
        return
    name = damaged(file, "adapter")
    require_alike(given, {"settings": {}}, name, ("settings",))
    for key, option in COMPUTES.items():
        before, now = given["settings"].get(key), mine.settings.get(key)
        if before != now:
            raise UserError(
                f"ckpt_path: the adapter of {file} has {option} {one_line(before)}, this run's has {one_line(now)}: "
                "give model.lora and model.policy as they were in its run"
            )


def require_state(checkpoint: Mapping[str, Any], file: str) -> None:
    """Refuse a checkpoint that training would go on from with a new optimiser or schedule, or from no known place.

    Lightning takes up what is there, and begins the rest anew.
    """
    loop = checkpoint["loops"].get("fit_loop")
    parts = {"loops": isinstance(loop, Mapping) and isinstance(loop.get("state_dict"), Mapping)}
    if "optimizer_states" in checkpoint:  # not in weights alone
        states, schedules = checkpoint["optimizer_states"], checkpoint.get("lr_schedulers", ())
        parts["lr_schedulers"] = len(schedules) == len(states)
        held = [state.get("state") for state in states]
        whole = all(isinstance(one, Mapping) and all(isinstance(s, Mapping) for s in one.values()) for one in held)
        parts["optimizer_states"] = whole and (all(held) or not checkpoint["global_step"])
    if lacking := [name for name, whole in parts.items() if not whole]:
        raise UserError(f"ckpt_path: {file} is damaged: its {lacking[0]} is not what a run writes; take an older one")


def require_loops(given: Mapping[str, Any], mine: Mapping[str, Any], file: str) -> None:
    """Refuse counters of the training loop that are none.

    Args:
        given: state of the fit loop, in a checkpoint.
        mine: of this run, before it began.
        file: of the checkpoint.
    """
    name = damaged(file, "fit_loop")
    counters = {key: value for key, value in mine.items() if key != "state_dict"}
    require_alike(given, counters, name, ("epoch_progress", "epoch_loop.batch_progress"))
    for part in counters:
        counts = given.get(part, {}).get("current", {})
        for count in ("started", "processed", "completed"):
            if counts.get(count, 0) > counts.get("ready", 0):
                most = f"expected at most {counts.get('ready', 0)}, as are ready, found {counts[count]}"
                raise UserError(f"{name}[{part!r}]['current'][{count!r}]: {most}")
    loaders = given["state_dict"].get("combined_loader", [])
    require_alike(loaders, [{}] * (len(loaders) if isinstance(loaders, list) else 1), f"{name} combined_loader")


def require_callbacks(given: Mapping[str, Any], callbacks: Iterable[Callback], file: str) -> None:
    """Refuse states of Lightning's own callbacks that these could not go on from, or would go wrong with later.

    Args:
        given: states by callback, in a checkpoint.
        callbacks: of this run.
        file: of the checkpoint.
    """
    for callback in callbacks:
        kind = next((kind for kind in CALLBACKS if isinstance(callback, kind)), None)
        if kind is None or callback.state_key not in given:
            continue
        state, mine = given[callback.state_key], callback.state_dict()
        if kind is Timer:  # whole only as long as it has not run
            mine = {"time_elapsed": {stage: float(seconds) for stage, seconds in mine["time_elapsed"].items()}}
        name = damaged(file, f"callbacks[{kind.__name__}]")
        require_alike(state, mine, name, CALLBACKS[kind])
        named = {f"[{key!r}]": part for key, part in state.items()}
        if kind is ModelCheckpoint:
            kept, none_yet = state.get("best_k_models", {}), ("best_model_score", "current_score")
            score = torch.zeros(())
            scores = {key: score for key in none_yet if state.get(key) is not None}
            require_alike(state, scores | {"dirpath": ""}, name)
            require_alike(kept, dict.fromkeys(kept, score), f"{name}['best_k_models']")
            if (worst := state.get("kth_best_model_path", "")) not in ("", *kept):
                expected = f"one of the best_k_models ({one_line(list(kept))})"
                raise UserError(f"{name}['kth_best_model_path']: expected {expected}, found {worst}")
            named |= {f"['best_k_models'][{path!r}]": score for path, score in kept.items()}
        for key, score in named.items():
            # None of these is ever NaN: Lightning keeps one as infinity.
            if isinstance(score, Tensor) and (not has_numbers(score) or score.isnan().any()):
                raise UserError(f"{name}{key}: expected a number or infinity, found {one_line(score)}")


def moments_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the optimiser, by names that say so."""
    return {
        f"{key} of parameter {number} in optimizer_states": value
        for held in checkpoint.get("optimizer_states", ())
        for number, state in held.get("state", {}).items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def pieces_of(module: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """What this rank holds of weights and of the optimisers' states, by names that say so."""
    names: dict[Any, str] = {parameter: name for name, parameter in module.named_parameters()}
    held: dict[str, Any] = {name: parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in getattr(optimizer, "state", {}).items():  # DeepSpeed's may have none of its own
            for key, value in state.items():
                held[f"{key} of {names.get(parameter, 'a parameter')} in optimizer_states"] = value
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    return {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}


def require_finite(weights: Mapping[str, Tensor], file: str) -> None:
    """Refuse a checkpoint of a run that had broken down, or whose file is damaged."""
    broken = [name for name, weight in weights.items() if not has_numbers(weight) or not torch.isfinite(weight).all()]
    if broken:
        raise UserError(
            f"ckpt_path: {len(broken)} of {len(weights)} tensors of {file} hold NaN, infinity or no numbers, like "
            f"{broken[0]}; take an older one"
        )
