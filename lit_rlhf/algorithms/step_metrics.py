"""How well steps are judged: counts that add up over micro-batches and ranks, and what they come to.

Axes: K steps of B solutions. A step is right where its label, or its predicted probability, is above one half.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


class StepCounts(NamedTuple):
    """Counts, each a scalar; sums of micro-batches and ranks add up."""

    right_as_right: Tensor  # steps
    wrong_as_wrong: Tensor
    right_as_wrong: Tensor
    wrong_as_right: Tensor
    sound: Tensor  # solutions without a wrong step
    sound_found: Tensor  # of them those in which none is thought wrong
    flawed: Tensor  # solutions with a wrong step
    flawed_found: Tensor  # of them those whose first wrong step is the first that is thought wrong

    def metrics(self) -> dict[str, Tensor]:
        """What the counts come to, each a scalar in [0, 1]; 0 where there is nothing to find.

        `error_f1` is of wrong steps, `f1` the mean of that and of the F1 of right ones. `first_error_f1` is the
        harmonic mean of the shares of flawed and of sound solutions that are judged rightly: Zheng et al. 2024
        (ProcessBench), https://arxiv.org/abs/2412.06559.
        """
        error_f1 = _f1(self.wrong_as_wrong, self.right_as_wrong, self.wrong_as_right)
        right_f1 = _f1(self.right_as_right, self.wrong_as_right, self.right_as_wrong)
        flawed, sound = _share(self.flawed_found, self.flawed), _share(self.sound_found, self.sound)
        return {
            "f1": (error_f1 + right_f1) / 2,
            "error_f1": error_f1,
            "first_error_f1": _share(2 * flawed * sound, flawed + sound),
        }


@check_shapes
def step_counts(
    scores: Float[Tensor, " K"], labels: Float[Tensor, " K"], solution_ids: Int[Tensor, " K"]
) -> StepCounts:
    """Counts of some solutions.

    Args:
        scores: (K,) log-odds that a step is right.
        labels: (K,) how probably it is.
        solution_ids: (K,) the solution that it belongs to, ascending, from 0.
    """
    right, thought_right = labels > 0.5, scores > 0
    errors, found = first_wrong(~right, solution_ids), first_wrong(~thought_right, solution_ids)
    flawed = errors < len(labels)
    counts = (
        right & thought_right,
        ~right & ~thought_right,
        right & ~thought_right,
        ~right & thought_right,
        ~flawed,
        ~flawed & (found == errors),
        flawed,
        flawed & (found == errors),
    )
    return StepCounts(*(count.sum().float() for count in counts))


def first_wrong(wrong: Bool[Tensor, " K"], solution_ids: Int[Tensor, " K"]) -> Int[Tensor, " B"]:
    """(B,) the first wrong step of each solution, by its place among the K; K where there is none."""
    K = len(wrong)
    places = torch.where(wrong, torch.arange(K, device=wrong.device), K)
    none = places.new_full((int(solution_ids[-1]) + 1,), K)
    return none.scatter_reduce(0, solution_ids, places, "amin")


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole, 0.0)


def _f1(hits: Tensor, false_alarms: Tensor, misses: Tensor) -> Tensor:
    return _share(2 * hits, 2 * hits + false_alarms + misses)
