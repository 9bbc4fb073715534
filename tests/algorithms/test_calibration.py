import math

import pytest
import torch
from torchmetrics.functional.classification import binary_calibration_error

from lit_rlhf.algorithms.calibration import NUM_BINS, Calibration, calibration


def labelled_margins(count=40_000, scale=1.0):
    """Margins of the true scores on pairs whose labels are drawn by Bradley-Terry, times a scale."""
    generator = torch.Generator().manual_seed(0)
    margins = 2 * torch.randn(count, generator=generator)
    agrees = torch.rand(count, generator=generator) < margins.sigmoid()
    return scale * torch.where(agrees, margins, -margins)


def test_the_true_scores_are_calibrated():
    assert calibration(labelled_margins()).error < 0.01


@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_timid_and_boastful_scores_are_not(scale):
    assert calibration(labelled_margins(scale=scale)).error > 0.08


def test_hand_worked_numbers():
    # Confidence σ(0) = 0.5, half right: bin 0 is exact. σ(log 3) = 0.75 twice, one right: |1 - 1.5| in one bin.
    # σ(30) = 1, right: exact. (0 + 0.5 + 0) / 4 pairs = 0.125
    margins = torch.tensor([0.0, math.log(3), -math.log(3), 30.0])
    assert calibration(margins).error.item() == pytest.approx(0.125, abs=1e-6)


def test_without_ties_the_error_is_that_of_torchmetrics():
    margins = labelled_margins(200)  # so few that bins err to either side
    confidence, correct = margins.abs().sigmoid(), (margins > 0).int()
    # Its bins reach from 0 to 1, of which confidence fills the upper half.
    expected = binary_calibration_error(confidence, correct, n_bins=2 * NUM_BINS)
    assert calibration(margins).error.item() == pytest.approx(expected.item(), abs=1e-5) and expected > 0.01


def test_bins_reach_from_a_half_to_one_and_hold_every_pair():
    bins = calibration(torch.tensor([0.0, 1e-3, 100.0, -100.0]))
    assert bins.size.tolist() == [2.0] + [0.0] * (NUM_BINS - 2) + [2.0]
    assert bins.correct.tolist() == [1.5] + [0.0] * (NUM_BINS - 2) + [1.0]


def test_a_score_that_is_not_finite_shows_in_the_error():
    assert calibration(torch.tensor([math.nan, 1.0])).error.isnan()


def test_bins_of_micro_batches_and_ranks_add_up():
    margins = labelled_margins(1000)
    parts = sum(torch.stack(calibration(part)) for part in margins.split(300))
    assert Calibration(*parts).error.item() == pytest.approx(calibration(margins).error.item(), abs=1e-6)
