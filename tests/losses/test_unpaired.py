"""KTO's loss of completions by themselves, and the reference point that it counts from."""

import math

import pytest
import torch

from lit_rlhf.losses import kto_loss, mismatched_kl
from tests.losses.family import column

YES, NO = torch.tensor([True]), torch.tensor([False])


def test_hand_worked_numbers():
    # log π = -1, log π_ref = -2: h = 1; β = 0.5, z₀ = 0.4: β (h - z₀) = 0.3, σ(0.3) = 0.574443
    assert kto_loss(column(-1), column(-2), YES, 0.5, 0.4).item() == pytest.approx(1 - 0.574443, abs=1e-6)
    assert kto_loss(column(-1), column(-2), NO, 0.5, 0.4, 1.0, 2.0).item() == pytest.approx(2 * 0.574443, abs=2e-6)


def test_at_the_reference_point_the_loss_is_half_of_the_weight():
    losses = kto_loss(column(-1, -1), column(-3, -3), torch.tensor([True, False]), 0.7, 2.0, 1.5, 0.5)
    assert losses.tolist() == [0.75, 0.25]


def test_desirable_goes_up_undesirable_down_and_the_gradient_is_greatest_at_the_reference_point():
    logratios = torch.linspace(-8, 12, 21, dtype=torch.float64).requires_grad_()
    for label, sign in ((True, -1), (False, 1)):
        labels = torch.full((21,), label)
        (gradient,) = torch.autograd.grad(
            kto_loss(logratios, torch.zeros_like(logratios), labels, 0.5, 2.0).sum(), logratios
        )
        assert (sign * gradient > 0).all()
        assert logratios[gradient.abs().argmax()].item() == 2.0


@pytest.mark.parametrize("logratio", [-1e3, 1e3])
def test_value_and_gradient_are_finite_far_from_the_reference(logratio):
    logratios = torch.full((2,), logratio, requires_grad=True)
    losses = kto_loss(logratios, torch.zeros(2), torch.tensor([True, False]), 1.0, 0.0)
    losses.sum().backward()
    assert losses.isfinite().all() and logratios.grad.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_that_would_leave_a_class_out_is_refused_by_name(weight):
    with pytest.raises(ValueError, match="desirable_weight"):
        kto_loss(column(-1), column(-2), YES, 0.5, 0.0, desirable_weight=weight)
    with pytest.raises(ValueError, match="undesirable_weight"):
        kto_loss(column(-1), column(-2), YES, 0.5, 0.0, undesirable_weight=weight)


def test_the_reference_point_is_the_mean_log_ratio_and_never_below_0():
    assert mismatched_kl(torch.tensor(3.0), 4.0).item() == 0.75
    assert mismatched_kl(torch.tensor(-3.0), 4.0).item() == 0.0
