"""Where Lightning's own tools and these modules meet: rates that are found, metrics that are watched, low precision."""

import difflib
import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from lit_rlhf.errors import UserError

HELD_OUT = ("val/", "val_", "valid")
MOST = 2**16  # weights of a tensor that are looked at
ENOUGH = 0.9  # share of weights that a step should move


def take_rate(optimizer: Any, schedule: Any, before: float, now: float) -> None:
    """Have an optimiser and its schedule go on at a rate that was found after they were made.

    LearningRateFinder sets the optimiser's rate alone, which the schedule puts back at its next step.

    Args:
        optimizer: its groups may have rates of their own, which keep their ratio.
        schedule: a `LambdaLR`, whose share of the rate at this step stays.
        before: the rate that both were made with.
        now: the rate that was found.
    """
    schedule.base_lrs = [rate * now / before if before else now for rate in schedule.base_lrs]
    take_scheduled_rate(optimizer, schedule)


def take_scheduled_rate(optimizer: Any, schedule: Any) -> None:
    """Have an optimiser's next step at the rate that its schedule has for it.

    A checkpoint brings along the rate that the schedule of its run had, which may have had another end.

    Args:
        optimizer: as above.
        schedule: likewise.
    """
    shares = [share(schedule.last_epoch) for share in schedule.lr_lambdas]
    for group, rate, share in zip(optimizer.param_groups, schedule.base_lrs, shares, strict=True):
        group["initial_lr"], group["lr"] = rate, rate * share
    schedule._last_lr = [group["lr"] for group in optimizer.param_groups]


def require_monitors(trainer: Any, held_out: bool) -> None:
    """Refuse callbacks that watch a metric which nothing logs, with the nearest that is logged.

    Args:
        trainer: has logged all that there is of the kind asked for.
        held_out: whether metrics of validation are asked for, or all others.

    Raises:
        UserError: names callback and metric.
    """
    known = sorted(trainer.callback_metrics)
    for callback in trainer.callbacks:
        watched = getattr(callback, "monitor", None)
        lenient = isinstance(callback, EarlyStopping) and not callback.strict
        if isinstance(callback, ModelCheckpoint) and watched in ("epoch", "step"):  # it counts these itself
            continue
        if not isinstance(watched, str) or watched in known or lenient or watched.startswith(HELD_OUT) != held_out:
            continue
        near = difflib.get_close_matches(watched, known, n=3, cutoff=0.5)
        said = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"{type(callback).__name__}: nothing logs its monitor {watched!r}; {said}")


def require_validation(trainer: Any) -> None:
    """Refuse callbacks that watch a metric of validation in a run without any: they would never act.

    Where there are held-out rows, and no epoch at whose end they are due, that is told.
    """
    if trainer.enable_validation and sum(trainer.num_val_batches):
        every, epochs = trainer.check_val_every_n_epoch, trainer.max_epochs
        if every is not None and epochs is not None and 0 < epochs < (trainer.current_epoch // every + 1) * every:
            rank_zero_info(
                f"nothing will be validated: that is due each {every} epochs (trainer.check_val_every_n_epoch), and "
                f"training ends after {epochs}"
            )
        elif (due := validated_at(trainer)) is not None and 0 < trainer.max_steps < due:
            rank_zero_info(
                f"nothing will be validated after training: that is due at step {due} (trainer.val_check_interval), "
                f"and training ends after {trainer.max_steps}"
            )
        return
    for callback in trainer.callbacks:
        watched = getattr(callback, "monitor", None)
        if isinstance(watched, str) and watched.startswith(HELD_OUT):
            raise UserError(
                f"{type(callback).__name__}: its monitor {watched!r} is measured on held-out rows, and this run has "
                "none: name some by data.validation, or watch a metric of training"
            )


def validated_at(trainer: Any) -> int | None:
    """The first step, counted from 0 for the whole run, after which a validation is due; None where none is known.

    Args:
        trainer: with its loaders, before the first step of this process.
    """
    batches, every, part = (
        trainer.num_training_batches,
        trainer.check_val_every_n_epoch,
        trainer.accumulate_grad_batches,
    )
    interval = trainer.val_check_batch  # in batches, within an epoch, or of all where no epochs are counted
    if math.isinf(batches) or not batches or interval is None or math.isinf(interval):
        return None
    if every is None:
        return math.ceil(interval / part) if trainer.global_step == 0 else None
    in_epoch = math.ceil(batches / part)
    before = (every - 1) * in_epoch
    due = before + math.ceil(min(interval, batches) / part)
    while due <= trainer.global_step:  # of a run that goes on
        due += every * in_epoch
    return due


def require_steps(trainer: Any) -> None:
    """Refuse to end well without a step of training, of this run or of those that it goes on from."""
    if trainer.global_step == 0:
        raise UserError(
            "the run has ended before its first step, by trainer.max_time or a callback: nothing was learnt, and no "
            "model is exported"
        )


@torch.no_grad()
def share_that_moves(parameters: Iterable[Tensor], rate: float) -> float:
    """Share of weights that a step of about `rate`, as AdamW's are, changes at all in their own precision.

    Args:
        parameters: of any shapes; of large ones an even sample is looked at.
        rate: size of the step.
    """
    moved = total = 0.0
    for parameter in parameters:
        values = (parameter.to_local() if isinstance(parameter, DTensor) else parameter).flatten()
        if not len(values):
            continue
        sample = values[:: max(len(values) // MOST, 1)]
        stays = (sample + torch.tensor(rate, dtype=torch.float32, device=sample.device) == sample).float().mean()
        moved += (1 - stays.item()) * parameter.numel()
        total += parameter.numel()
    return moved / total if total else 1.0


def warn_of_rounding(parameters: Iterable[Tensor], rate: float, precision: str) -> None:
    """Say so where most of what would be learnt is rounded away.

    In bfloat16, neighbouring numbers around w are |w|/256 to |w|/128 apart: a smaller step than half of that is none.
    """
    low = [parameter for parameter in parameters if parameter.requires_grad and parameter.dtype.itemsize < 4]
    share = share_that_moves(low, rate)
    if share < ENOUGH:
        rank_zero_warn(
            f"trainer.precision {precision}: a step of the size of learning_rate ({rate:g}) moves {share:.1%} of the "
            "weights; the others are rounded to where they were, and do not learn. Use trainer.precision: "
            "bf16-mixed, which keeps the weights in float32, or 32-true"
        )


def scales_gradients(trainer: Trainer) -> bool:
    """Whether the loss is multiplied before it goes backward, as in fp16; gradients may then be infinite at times."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def takes_gradients_early(trainer: Trainer) -> bool:
    """Whether a part of the loss may go backward before the rest: each rank has whole weights, gradients no scale."""
    whole = isinstance(trainer.strategy, SingleDeviceStrategy) or type(trainer.strategy) is DDPStrategy
    return whole and not scales_gradients(trainer)
