"""Methods that learn from some completions of each prompt alone: which ones, and their rollout."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.rollout.experience import PlannedRollout
from lit_rlhf.rollout.play import Play


def strongest(advantages: Tensor, count: int) -> np.ndarray:
    """Of each group the completions whose advantages are the largest in size, the most positive first.

    Args:
        advantages: (groups, G) of the completions of a prompt.
        count: k, how many are kept.

    Returns:
        (groups, k) their numbers among all.
    """
    kept = advantages.abs().argsort(dim=1, descending=True, stable=True)[:, :count].sort().values
    order = advantages.gather(1, kept).argsort(dim=1, descending=True, stable=True)
    firsts = torch.arange(len(advantages))[:, None] * advantages.shape[1]
    return np.asarray((firsts + kept.gather(1, order)).numpy())


def part_of(played: Play, kept: np.ndarray) -> Play:
    """These episodes alone, (groups, k) numbers, as if k of each prompt had been played."""
    numbers = kept.ravel().tolist()
    return Play([played.episodes[i] for i in numbers], [played.sampled_logprobs[i] for i in numbers])


def columns_of(
    columns: Mapping[str, Tensor], whole: PlannedRollout, part: PlannedRollout, kept: np.ndarray
) -> dict[str, Tensor]:
    """Token columns of a part of a rollout.

    Args:
        columns: (M,) each, in the order of `whole`.
        whole: the rollout.
        part: of the episodes that are kept.
        kept: (groups, k) numbers of these in `whole`.

    Returns:
        In the order of `part`.
    """
    row_of = np.argsort(whole.order)
    rows = row_of[kept.ravel()[part.order]].tolist()
    parts = {name: column.split(whole.lengths.tolist()) for name, column in columns.items()}
    return {name: torch.cat([of_rows[row] for row in rows]) for name, of_rows in parts.items()}
