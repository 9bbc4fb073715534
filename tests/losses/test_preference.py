import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lit_rlhf.losses import (
    bradley_terry_loss,
    conservative_dpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    robust_dpo_loss,
)
from tests.losses.family import ONE, argmin_margin, at, column, randoms


class TestOptima:
    @pytest.mark.parametrize("epsilon", [0.05, 0.2])
    def test_cdpo_is_least_at_a_margin_of_logit_over_beta(self, epsilon):
        loss = partial(conservative_dpo_loss, label_smoothing=epsilon)
        assert argmin_margin(loss, 0.4) == pytest.approx(math.log((1 - epsilon) / epsilon) / 0.4, abs=1e-3)

    @pytest.mark.parametrize("epsilon", [0.05, 0.2])
    def test_exo_is_zero_at_a_margin_of_logit_over_beta(self, epsilon):
        loss = partial(exo_pair_loss, label_smoothing=epsilon)
        optimum = math.log((1 - epsilon) / epsilon) / 0.4
        assert argmin_margin(loss, 0.4) == pytest.approx(optimum, abs=1e-3)
        assert at(loss, column(optimum), column(0), 0.4).item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_ipo_is_zero_at_a_margin_of_one_over_two_beta(self, beta):
        assert argmin_margin(ipo_loss, beta) == pytest.approx(1 / (2 * beta), abs=1e-3)
        assert at(ipo_loss, column(1 / (2 * beta)), column(0), beta).item() == pytest.approx(0)

    def test_hinge_has_no_gradient_once_the_margin_is_one_over_beta(self):
        chosen = column(1.9, 2.1).requires_grad_()
        at(hinge_loss, chosen, column(0, 0), 0.5).sum().backward()
        assert chosen.grad.tolist() == [-0.5, 0.0]

    def test_dpo_under_bradley_terry_labels_is_least_where_the_implicit_reward_is_the_reward(self):
        # Labels drawn with P(first wins) = σ(Δr), Δr = 1.3: the mean loss over both labels, β = 0.2.
        margins = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
        p = 1 / (1 + math.exp(-1.3))
        zeros = torch.zeros_like(margins)
        mean_loss = p * at(dpo_loss, margins, zeros, 0.2) + (1 - p) * at(dpo_loss, zeros, margins, 0.2)
        assert 0.2 * margins[mean_loss.argmin()].item() == pytest.approx(1.3, abs=1e-3)


class TestEquivalences:
    """The same number from another road."""

    pair = tuple(randoms(seed) for seed in range(4))
    reward_margin = 0.3 * ((pair[0] - pair[2]) - (pair[1] - pair[3]))

    def test_cdpo_is_cross_entropy_with_soft_labels(self):
        expected = F.binary_cross_entropy_with_logits(
            self.reward_margin, torch.full_like(self.reward_margin, 0.85), reduction="none"
        )
        assert torch.allclose(conservative_dpo_loss(*self.pair, 0.3, 0.15), expected)

    def test_robust_dpo_averages_to_dpo_over_flipped_labels(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        kept = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.15)
        flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.3, 0.15)
        assert torch.allclose(0.85 * kept + 0.15 * flipped, dpo_loss(*self.pair, 0.3))

    @pytest.mark.parametrize("smoothed", [conservative_dpo_loss, robust_dpo_loss])
    def test_label_smoothing_of_zero_is_dpo(self, smoothed):
        assert torch.allclose(smoothed(*self.pair, 0.3, 0.0), dpo_loss(*self.pair, 0.3))

    def test_dpo_is_the_reward_models_loss_on_implicit_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        constant = 4.2  # β log Z(x): the same for both responses
        rewards = (0.3 * (chosen - ref_chosen) + constant, 0.3 * (rejected - ref_rejected) + constant)
        assert torch.allclose(bradley_terry_loss(*rewards), dpo_loss(*self.pair, 0.3))

    def test_dpo_gradient_weighs_a_pair_by_how_wrong_its_order_is(self):
        chosen, rejected = (x.clone().requires_grad_() for x in self.pair[:2])
        dpo_loss(chosen, rejected, *self.pair[2:], 0.3).sum().backward()
        wrong = torch.sigmoid(-self.reward_margin)  # what the implicit reward gives to the other order
        assert torch.allclose(chosen.grad, -0.3 * wrong)
        assert torch.allclose(rejected.grad, 0.3 * wrong)

    def test_label_smoothing_changes_the_loss(self):
        assert not torch.allclose(conservative_dpo_loss(*self.pair, 0.3, 0.1), dpo_loss(*self.pair, 0.3))

    def test_exo_is_the_kl_from_the_policys_preference_to_the_smoothed_label(self):
        policy = torch.distributions.Bernoulli(logits=self.reward_margin)
        label = torch.distributions.Bernoulli(probs=torch.tensor(0.9, dtype=torch.float64))
        expected = torch.distributions.kl_divergence(policy, label)
        assert torch.allclose(exo_pair_loss(*self.pair, 0.3, 0.1), expected)

    def test_discopop_is_logistic_below_and_exponential_above_zero(self):
        low, high = (at(discopop_loss, column(h), column(0), 1.0).item() for h in (-3.0, 3.0))
        assert low == pytest.approx(-math.log(1 / (1 + math.exp(3))))
        assert high == pytest.approx(math.exp(-3))

    def test_discopop_has_a_hump_around_the_reference(self):
        # The paper names the local optimum -2.3714 in units of τ = 0.05: z = -0.11857.
        z = torch.linspace(-0.5, 0.05, 55_001, dtype=torch.float64)
        assert z[at(discopop_loss, z, torch.zeros_like(z), 1.0).argmin()].item() == pytest.approx(-0.11857, abs=1e-4)


@pytest.mark.parametrize("loss", [conservative_dpo_loss, robust_dpo_loss, exo_pair_loss])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused_by_name(loss, label_smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing \("):
        loss(ONE, ONE, ONE, ONE, 0.1, label_smoothing)


def test_exo_refuses_hard_labels_by_name():
    with pytest.raises(ValueError, match=r"label_smoothing \(0.0\) must be in \(0, 0.5\)"):
        exo_pair_loss(ONE, ONE, ONE, ONE, 0.1, 0.0)
