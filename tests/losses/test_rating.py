import pytest
import torch

from lit_rlhf.losses import apo_down_loss, apo_zero_loss, bco_pair_loss, nca_pair_loss, sppo_hard_loss
from tests.losses.family import LOG2, STARTS, at, column, descend, randoms


class TestOptima:
    def test_sppo_asks_for_opposite_log_ratios(self):
        chosen, rejected = column(0.3).requires_grad_(), column(-0.1).requires_grad_()
        optimizer = torch.optim.SGD([chosen, rejected], lr=0.4)
        for _ in range(50):
            optimizer.zero_grad()
            at(sppo_hard_loss, chosen, rejected, 0.25).sum().backward()
            optimizer.step()
        assert (chosen.item(), rejected.item()) == pytest.approx((2.0, -2.0))

    def test_nca_stops_raising_the_chosen_response_at_an_implicit_reward_of_log_2(self):
        chosen = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
        best = chosen[at(nca_pair_loss, chosen, torch.zeros_like(chosen), 0.5).argmin()].item()
        assert 0.5 * best == pytest.approx(LOG2, abs=1e-3)


class TestLimits:
    """Losses without an optimum, on free log-ratios: where gradient descent takes them."""

    def test_apo_zero_raises_chosen_and_lowers_rejected_without_end(self):
        chosen, rejected = (x.clone().requires_grad_() for x in STARTS)
        at(apo_zero_loss, chosen, rejected).sum().backward()
        assert (chosen.grad < 0).all() and (rejected.grad > 0).all()  # wherever they are, each by itself
        (chosen, rejected), end = descend(apo_zero_loss, STARTS)
        assert chosen.min() > 10 and rejected.max() < -10 and end.max() < 0.01  # its infimum is 0

    def test_apo_down_lowers_rejected_first_then_chosen_too_while_the_margin_grows(self):
        # At the reference σ' of both terms is the same: chosen stands, rejected falls.
        chosen, rejected = column(0).requires_grad_(), column(0).requires_grad_()
        at(apo_down_loss, chosen, rejected).sum().backward()
        assert chosen.grad.item() == 0 and rejected.grad.item() == pytest.approx(0.5 / 4)
        (chosen, rejected), end = descend(apo_down_loss, (torch.zeros(1), torch.zeros(1)), steps=200)
        assert rejected.item() < chosen.item() - 5 < -5
        (chosen, rejected), end = descend(apo_down_loss, STARTS)
        assert chosen.max() < -5 and (rejected < chosen - 5).all() and end.max() < 0.05  # its infimum is 0


class TestEquivalences:
    """The same number from another road."""

    pair = tuple(randoms(seed) for seed in range(4))

    def test_bco_with_the_right_shift_ignores_a_constant_in_the_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        moved = bco_pair_loss(chosen + 2, rejected + 2, ref_chosen, ref_rejected, 0.3, reward_shift=0.6)
        assert torch.allclose(moved, bco_pair_loss(*self.pair, 0.3))
