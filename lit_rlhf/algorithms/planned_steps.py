"""How many optimiser steps a run comes to, over all of its parts: what its schedule is laid over."""

import math
from collections.abc import Mapping
from typing import Any


def planned_steps(trainer: Any, resumed: Mapping[str, Any] | None) -> float:
    """Optimiser steps up to the end of a run: those of the checkpoint that it goes on from, and those that are left.

    Lightning's `estimated_stepping_batches` takes it that each epoch so far had as many as one has now; with another
    budget of tokens, accumulation or number of rows it had more or fewer.

    Args:
        trainer: of this run; its loader is set up here.
        resumed: a checkpoint, which is whole; None where the run begins anew.

    Returns:
        Infinity where the run has no end.
    """
    planned = trainer.estimated_stepping_batches
    if resumed is None or trainer.max_epochs == -1 or not math.isfinite(trainer.num_training_batches):
        return float(planned)
    of_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
    made, loop = resumed["global_step"], resumed["loops"]["fit_loop"]
    epochs, batches = loop["epoch_progress"]["current"], loop["epoch_loop.batch_progress"]
    left = max(trainer.max_epochs - epochs["processed"], 0) * of_epoch
    if epochs["ready"] > epochs["processed"] and left:  # in the midst of an epoch
        whole = batches["is_last_batch"]
        left -= of_epoch if whole else batches["current"]["processed"] // trainer.accumulate_grad_batches
    total = made + max(left, 0)
    return float(total if trainer.max_steps == -1 else min(total, trainer.max_steps))
