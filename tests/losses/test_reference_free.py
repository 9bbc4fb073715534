"""SimPO, CPO and ORPO: pairs by the policy's own log-probs."""

import math

import pytest
import torch

from lit_rlhf.losses import cpo_loss, orpo_loss, simpo_loss
from lit_rlhf.losses.reference_free import log_odds_of
from tests.losses.family import column, randoms

# One pair by hand: log π(y_w) = -1 of 2 tokens, log π(y_l) = -4 of 4: means -0.5 and -1.
PAIR = (column(-1), column(-4), column(2), column(4))
LOSSES = {
    "simpo": lambda *pair: simpo_loss(*pair, 2.0, 0.5, 0.1),
    "cpo": lambda *pair: cpo_loss(*pair, 0.5, 0.1),
    "orpo": lambda *pair: orpo_loss(*pair, 0.5),
}


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        # 2 · 0.5 - 0.4 = 0.6: -log σ(0.6)
        (simpo_loss(*PAIR, 2.0, 0.4), 0.437488),
        (simpo_loss(*PAIR, 2.0, 0.4, 0.3), 0.437488 + 0.3 * 0.5),
        # 0.5 · 3 = 1.5: -log σ(1.5) + 0.5
        (cpo_loss(*PAIR, 0.5), 0.201413 + 0.5),
        # odds: e^-0.5/(1 - e^-0.5) = 1.541494, e^-1/(1 - e^-1) = 0.581977; log ratio 0.974077, -log σ = 0.320300
        (orpo_loss(*PAIR, 0.2), 0.5 + 0.2 * 0.320300),
    ],
    ids=["simpo", "cpo-simpo", "cpo", "orpo"],
)
def test_hand_worked_numbers(loss, expected):
    assert loss.item() == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_chosen_goes_up_and_rejected_down_and_pairs_do_not_feel_their_neighbours(name):
    chosen, rejected = (-randoms(seed).exp().requires_grad_() for seed in (0, 1))
    lengths = torch.arange(1.0, 7.0), torch.arange(6.0, 0.0, -1)
    losses = LOSSES[name](chosen, rejected, *lengths)
    up, down = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert (up < 0).all() and (down > 0).all()
    alone = [LOSSES[name](*(x[i : i + 1] for x in (chosen, rejected, *lengths))) for i in range(6)]
    assert torch.allclose(torch.cat(alone), losses)


def test_the_length_of_a_response_is_no_reward_of_simpo_and_orpo():
    equal = (column(-2), column(-6), column(2), column(6))  # a nat per token, both
    assert simpo_loss(*equal, 5.0, 0.0).item() == pytest.approx(math.log(2))
    assert orpo_loss(*equal, 1.0).item() == pytest.approx(1 + math.log(2))
    assert cpo_loss(*equal, 1.0, 0.0).item() < 0.1


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("logprob", [0.0, -1e4])
def test_value_and_gradient_are_finite_for_sure_and_for_impossible_responses(name, logprob):
    pair = [torch.tensor([x], requires_grad=True) for x in (logprob, -1e4 - logprob)]
    losses = LOSSES[name](*pair, torch.ones(1), torch.ones(1))
    losses.sum().backward()
    assert losses.isfinite().all() and all(x.grad.isfinite().all() for x in pair)


def test_log_odds_are_0_at_one_half_and_rise_with_the_probability():
    odds = log_odds_of(torch.tensor([0.1, 0.5, 0.9]).log())
    assert torch.allclose(odds, torch.tensor([0.1, 0.5, 0.9]).logit(), atol=1e-6)


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan])
def test_coefficients_that_are_none_are_refused_by_name(value):
    with pytest.raises(ValueError, match="nll_coef"):
        cpo_loss(*PAIR, 0.5, value)
    with pytest.raises(ValueError, match="odds_coef"):
        orpo_loss(*PAIR, value)
