"""Whether a run can go on from what a checkpoint holds: its weights, its optimiser, its counters, its callbacks."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lit_rlhf.errors import UserError, damaged, one_line, require_alike
from lit_rlhf.models.adapter_folders import Origin

CALLBACKS: dict[type[Callback], tuple[str, ...]] = {  # Lightning's that have a state, and what each must find in it
    EarlyStopping: ("wait_count", "stopped_epoch", "best_score", "patience"),
    ModelCheckpoint: ("best_model_score", "best_model_path"),
    Timer: (),
}
COUNTED = ("epoch_progress", "epoch_loop.batch_progress")  # parts of the loop that say how much of a run is left
COMPUTES = {  # settings of an adapter, by PEFT's names, that its weights were learnt with -> our options
    "r": "lora.r",
    "lora_alpha": "lora.alpha",
    "use_rslora": "lora.use_rslora",
    "use_dora": "lora.use_dora",
    "rank_pattern": "lora.rank_pattern",
    "alpha_pattern": "lora.alpha_pattern",
}


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


def warn_of_rounded(given: Mapping[str, Any], mine: Mapping[str, Any], file: str) -> None:
    """Say so where a checkpoint holds weights in fewer bits than this run: what was rounded away does not come back."""
    held = {name: (given[name], mine[name]) for name in given.keys() & mine.keys()}
    rounded = sorted(name for name, (theirs, ours) in held.items() if theirs.dtype.itemsize < ours.dtype.itemsize)
    if rounded:
        theirs, ours = (str(one.dtype).removeprefix("torch.") for one in held[rounded[0]])
        rank_zero_warn(
            f"ckpt_path: {len(rounded)} tensors of {file} hold {theirs}, such as {rounded[0]}, and this run {ours}: "
            "it goes on from rounded weights; if its run did not hold them so (trainer.precision), take an older one"
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
    require_alike(given, counters, name, COUNTED)
    for part in counters:
        counts = given.get(part, {}).get("current", {})
        if part in COUNTED:
            needed = tuple(counters[part].get("current", ()))
            require_alike(counts, {}, f"{name}[{part!r}]['current']", needed)
        for count in ("started", "processed", "completed"):
            if counts.get(count, 0) > counts.get("ready", 0):
                most = f"expected at most {counts.get('ready', 0)}, as are ready, found {counts[count]}"
                raise UserError(f"{name}[{part!r}]['current'][{count!r}]: {most}")
    loaders = given["state_dict"].get("combined_loader", [])
    require_alike(loaders, [{}] * (len(loaders) if isinstance(loaders, list) else 1), f"{name} combined_loader")


def reopen_cut_epoch(given: Mapping[str, Any]) -> None:
    """Count an epoch that the end of a run cut short, as by `max_steps`, as under way; Lightning counts it as made.

    Args:
        given: state of the fit loop, in a checkpoint; changed where its data loader stopped before the last batch.
    """
    loaders = given["state_dict"].get("combined_loader", [])
    under_way = False  # what is no such state is refused when it is loaded
    for loader in loaders:
        ranks = loader["ranks"] if isinstance(loader.get("ranks"), list) else []
        under_way |= loader.get("taken") not in (None, 0, loader.get("length"))
        under_way |= any(isinstance(rank, Mapping) and bool(rank.get("done")) for rank in ranks)
    # With limit_train_batches, too, a loader is not taken to its end, but then the last batch was.
    if under_way and not given["epoch_loop.batch_progress"].get("is_last_batch", True):
        for counts in given["epoch_progress"].values():
            if counts["processed"] == counts["started"]:
                counts["processed"] = counts["completed"] = counts["started"] - 1


def require_epochs(given: Mapping[str, Any], most: int | None, file: str) -> None:
    """Refuse to go on from a run that has made more epochs than this one shall have.

    Args:
        given: state of the fit loop, in a checkpoint.
        most: the Trainer's `max_epochs`; None or -1 = no limit.
        file: of the checkpoint.
    """
    made = given.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if most not in (None, -1) and made > most:
        raise UserError(
            f"ckpt_path: the run of {file} has made {made} epochs already, and trainer.max_epochs is {most}: raise it "
            "to go on, or take an older checkpoint"
        )


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
