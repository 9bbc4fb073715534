"""The optimiser by its name: AdamW of torch, or that of bitsandbytes with moments in 8 bits; and its stored states."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lit_rlhf.algorithms.settings import LEAST_EPS, OptimizerSettings
from lit_rlhf.errors import UserError, damaged, one_line, require_alike
from lit_rlhf.models.holding import require_bitsandbytes

NEEDED = ("lr", "betas", "eps", "weight_decay")  # of a group, for a step
BELOW = {"lr": math.inf, "initial_lr": math.inf, "weight_decay": math.inf, "betas": 1, "eps": 1}  # and not below 0
VARIES = ("params", "fused", *BELOW)  # all else of a group is as a run of this library has it
MOMENTS = ("exp_avg", "exp_avg_sq")
# Options of a module -> what they are called in the groups that they are made into.
IN_GROUPS = {
    "learning_rate": "initial_lr",
    "critic_learning_rate": "initial_lr",
    "weight_decay": "weight_decay",
    "adam_betas": "betas",
    "adam_eps": "eps",
}
DAMAGED = "ckpt_path: {} is damaged, or of another run, so take an older one: its"
LEARNT = "optimizer_learnt"  # key of a checkpoint: what `learnt_by` gives of it
Change = tuple[Any, Any]  # of an option: what the checkpoint's run had, and what this one has


def changes(given: Any, mine: Mapping[str, Any], file: str) -> dict[str, Change]:
    """The options that a run was given otherwise than the run of the checkpoint that it goes on from.

    Args:
        given: options of that run, perhaps among others; those that it does not name are as they were.
        mine: of this one, as plain values.
        file: of the checkpoint.

    Raises:
        UserError: they are no options, or of another optimiser, whose state has other parts.
    """
    require_alike(given, {}, damaged(file, "options of the optimiser"))
    changed = {name: (given[name], now) for name, now in mine.items() if name in given and given[name] != now}
    if "optimizer" in changed:
        theirs, ours = changed["optimizer"]
        raise UserError(
            f"ckpt_path: {file} holds the state of optimizer {one_line(theirs)}, this run has {ours}: set "
            f"model.optimizer: {one_line(theirs)}, or start a new run from what lit-rlhf export makes of it"
        )
    return changed


def take_options(optimizer: Optimizer, schedule: Any, made: list[dict[str, Any]], names: Iterable[str]) -> None:
    """Have a restored optimiser and its schedule go on with options of this run; what a checkpoint brings is its run's.

    Args:
        optimizer: with the groups that the checkpoint had.
        schedule: a `LambdaLR`, of the same.
        made: the groups as this run made them.
        names: the options that are to be taken.
    """
    for key in {IN_GROUPS[name] for name in names if name in IN_GROUPS}:
        for group, own in zip(optimizer.param_groups, made, strict=True):
            group[key] = own[key]
    if isinstance(schedule, LambdaLR):
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]


def require_own_state(checkpoint: Mapping[str, Any], optimizer: Optimizer, schedule: LRScheduler, file: str) -> None:
    """Refuse states of optimiser and schedule that are not of this run's kind, before a step is computed with them.

    Args:
        checkpoint: of the Trainer's; one of sharded weights says nothing here.
        optimizer: of this run, before its first step.
        schedule: likewise.
        file: of the checkpoint.

    Raises:
        UserError: names the file, the part and what stands there.
    """
    name = DAMAGED.format(file)
    steps, states = checkpoint["global_step"], checkpoint.get("optimizer_states", ())
    for given in checkpoint.get("lr_schedulers", ()):
        require_alike(given, schedule.state_dict(), f"{name} lr_schedulers", ("base_lrs", "last_epoch", "lr_lambdas"))
        _require_below(math.inf, given["base_lrs"], f"{name} lr_schedulers['base_lrs']")
        if states and steps - given["last_epoch"] not in (0, 1):  # 1 between a step and that of its schedule
            raise UserError(f"{name} lr_schedulers['last_epoch']: expected {steps} steps, found {given['last_epoch']}")
    for given in states:
        require_own_groups(given, optimizer.param_groups, type(optimizer) is AdamW, steps, name)
    if states and (noted := checkpoint.get(LEARNT, learnt_by(checkpoint))) != learnt_by(checkpoint):
        raise UserError(f"{name} optimizer_states are not of the weights that had learnt, {one_line(noted)}")


def require_own_groups(given: Any, groups: list[dict[str, Any]], has_moments: bool, steps: int, name: str) -> None:
    """The same of one optimiser's state.

    Args:
        given: as of `Optimizer.state_dict`.
        groups: of this run as they were made, with their parameters.
        has_moments: whether it keeps AdamW's, of each parameter's shape.
        steps: that were taken.
        name: of the file, as the start of a message.
    """
    own = [{**group, "params": None} for group in groups]
    require_alike(given, {"param_groups": own, "state": {}}, f"{name} optimizer_states", ("param_groups", "state"))
    for number, (group, mine) in enumerate(zip(given["param_groups"], groups, strict=True)):
        part = f"{name} param_groups[{number}]"
        require_alike(group, {}, part, ("params", *(key for key in NEEDED if key in mine)))
        require_alike(group["params"], [None] * len(mine["params"]), f"{part}['params']")
        for key in BELOW.keys() & group.keys():
            _require_below(BELOW[key], group[key], f"{part}[{key!r}]")
        for key in group.keys() & mine.keys() - set(VARIES):
            if group[key] != mine[key]:
                raise UserError(f"{part}[{key!r}]: expected {mine[key]}, found {one_line(repr(group[key]))}")
        for key, parameter in zip(group["params"], mine["params"], strict=True):
            if key in given["state"] and has_moments and isinstance(key, int):
                _require_moments(given["state"][key], parameter, steps, f"{name} state[{key}]")


def require_read_state(optimizer: Optimizer, made: list[dict[str, Any]], steps: int, file: str) -> None:
    """As `require_own_state`, of a state that each rank has read into its optimiser by itself (FSDP2).

    Args:
        optimizer: with what was read; one that is not torch's is not looked at.
        made: its groups as this run made them.
        steps: that were taken.
        file: of the checkpoint.
    """
    if type(optimizer) is AdamW:
        groups = [{**group, **own} for group, own in zip(optimizer.param_groups, made, strict=True)]
        require_own_groups(optimizer.state_dict(), groups, True, steps, DAMAGED.format(file))


def learnt_by(checkpoint: Mapping[str, Any]) -> list[list[Any]]:
    """By optimiser in a checkpoint, the parameters that it has a state of: those which have had a gradient so far."""
    return [list(given["state"]) for given in checkpoint.get("optimizer_states", ())]


def _require_below(limit: float, given: Any, name: str) -> None:
    if name.endswith("['eps']") and given < LEAST_EPS:
        raise UserError(f"{name}: expected {LEAST_EPS:g} or more, found {given}")
    values = given if isinstance(given, list | tuple) else [given]
    if not all(0 <= value < limit for value in values):
        bound = "" if limit == math.inf else f" and below {limit}"
        raise UserError(f"{name}: expected 0 or more{bound}, found {given}")


def _require_moments(given: Any, parameter: nn.Parameter, steps: int, name: str) -> None:
    require_alike(given, {}, name, ("step", *MOMENTS))
    shapes = {"step": torch.Size(), **dict.fromkeys(MOMENTS, parameter.shape)}
    for key, shape in shapes.items():
        found = given[key]
        if not isinstance(found, Tensor) or found.shape != shape or not found.is_floating_point():
            said = f"one of {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{name}[{key!r}]: expected a tensor of {tuple(shape)}, found {said}")
    if not 0 <= given["step"] <= steps:
        raise UserError(f"{name}['step']: expected at most {steps} steps, found {given['step']:g}")
    squares = given["exp_avg_sq"].to_local() if isinstance(given["exp_avg_sq"], DTensor) else given["exp_avg_sq"]
    if (squares < 0).any():
        raise UserError(f"{name}['exp_avg_sq']: expected squares, found {squares.min():g}")


def make_optimizer(
    settings: OptimizerSettings, groups: list[dict[str, Any]], modules: Iterable[nn.Module], fused: bool
) -> Optimizer:
    """An optimiser of these groups.

    Args:
        settings: the optimiser's.
        groups: of parameters, with learning rates and decay.
        modules: those that are trained, in which embeddings are told from other matrices.
        fused: one kernel for the whole step, where torch makes it.
    """
    shared: dict[str, Any] = {"betas": settings.adam_betas, "eps": settings.adam_eps}
    if settings.optimizer == "adamw":
        return AdamW(groups, **shared, fused=fused)
    bitsandbytes = require_bitsandbytes("optimizer: adamw_8bit")
    optimizer: Optimizer = bitsandbytes.optim.AdamW8bit(groups, **shared)
    # Few tokens of a batch touch a row of an embedding, so that its moments differ by more than 8 bits hold; as in
    # transformers, they stay in 32 (Dettmers et al. 2022, section 2.3, https://arxiv.org/abs/2110.02861).
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in modules:
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer
