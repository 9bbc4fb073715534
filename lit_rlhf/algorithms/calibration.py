"""Whether a reward model earns its confidence: P(chosen beats rejected) = σ(margin), against how often that is so.

By hand, since torchmetrics' `BinaryCalibrationError` knows no tie that counts half, and keeps and gathers every
confidence, where a few sums do, which are drawn as well.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes

NUM_BINS = 10


class Calibration(NamedTuple):
    """Pairs in bins of confidence max(p, 1 - p), from 0.5 to 1; sums of micro-batches and ranks add up."""

    size: Tensor  # (NUM_BINS,) pairs
    confidence: Tensor  # (NUM_BINS,) sum of their confidences
    correct: Tensor  # (NUM_BINS,) how many the preferred response won; a tie is half

    @property
    def error(self) -> Tensor:
        """() expected calibration error: mean over pairs of the |accuracy - confidence| of their bin.

        Naeini et al. 2015; Guo et al. 2017, Eq. 3, https://arxiv.org/abs/1706.04599
        """
        return (self.correct - self.confidence).abs().sum() / self.size.sum()


@check_shapes
def calibration(margins: Float[Tensor, " B"]) -> Calibration:
    """Bins of pairs.

    Args:
        margins: (B,) r(x, y_w) - r(x, y_l).
    """
    confidence = margins.abs().sigmoid()
    correct = (margins > 0).float() + 0.5 * (margins == 0).float()
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    empty = torch.zeros(NUM_BINS, dtype=torch.float32, device=margins.device)
    columns = (torch.ones_like(confidence), confidence, correct)
    return Calibration(*(empty.index_add(0, bins, column.float()) for column in columns))
