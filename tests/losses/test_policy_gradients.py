import math

import pytest
import torch

from lit_rlhf.losses import (
    PolicyTokens,
    cispo_policy_loss,
    gspo_policy_loss,
    policy_gradient_loss,
    ppo_policy_loss,
    value_loss,
)
from tests.losses.random_tensors import randoms


class TestPPOPolicyLoss:
    def test_it_is_minus_the_advantage_where_policy_and_old_policy_agree(self):
        logprobs, advantages = randoms(9), randoms(9, seed=1)
        assert torch.equal(ppo_policy_loss(PolicyTokens(logprobs, logprobs, advantages), 0.2).losses, -advantages)

    def test_its_first_gradient_is_the_policy_gradient(self):
        logprobs, advantages = randoms(9).requires_grad_(), randoms(9, seed=1)
        ppo_policy_loss(PolicyTokens(logprobs, logprobs.detach(), advantages), 0.2).losses.sum().backward()
        assert torch.allclose(logprobs.grad, -advantages)

    def test_hand_worked_numbers(self):
        ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
        advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 3.0])
        # ratio 1.5, A = +2: min(3, 1.2 * 2) = 2.4; A = -2: min(-3, -2.4) = -3
        # ratio 0.5, A = +2: min(1, 0.8 * 2) = 1.0; A = -2: min(-1, -1.6) = -1.6
        # ratio 1.1, A = +3: inside, 3.3
        losses = ppo_policy_loss(PolicyTokens(ratios.log(), torch.zeros(5), advantages), 0.2).losses
        assert torch.allclose(losses, -torch.tensor([2.4, -3.0, 1.0, -1.6, 3.3]))

    def test_it_has_no_gradient_past_the_clip_and_the_full_one_on_the_way_back(self):
        # ratios 1.5, 0.5, 1.5, 0.5 with advantages of a sign that pays (first two) and that costs (last two)
        logprobs = torch.tensor([1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
        advantages = torch.tensor([1.0, -1.0, -1.0, 1.0])
        ppo_policy_loss(PolicyTokens(logprobs, torch.zeros(4), advantages), 0.2).losses.sum().backward()
        assert torch.allclose(logprobs.grad, torch.tensor([0.0, 0.0, 1.5, -0.5]))

    def test_it_agrees_with_a_loop_over_tokens(self):
        logprobs, old, advantages = randoms(50), randoms(50, seed=1), randoms(50, seed=2)
        expected = []
        for new_p, old_p, a in zip(logprobs.exp().tolist(), old.exp().tolist(), advantages.tolist(), strict=True):
            ratio = new_p / old_p
            if a >= 0:  # a good token pays until the ratio is 1.3
                expected.append(-a * (ratio if ratio < 1.3 else 1.3))
            else:  # a bad one stops costing at 0.7
                expected.append(-a * (ratio if ratio > 0.7 else 0.7))
        actual = ppo_policy_loss(PolicyTokens(logprobs, old, advantages), 0.3).losses
        assert actual.tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("logratio", [-100.0, 100.0])
    @pytest.mark.parametrize("advantage", [-1.0, 1.0])
    def test_value_and_gradient_are_finite_at_log_ratios_of_100(self, logratio, advantage):
        logprobs = torch.tensor([logratio], requires_grad=True)
        loss = ppo_policy_loss(PolicyTokens(logprobs, torch.zeros(1), torch.tensor([advantage])), 0.2).losses
        loss.sum().backward()
        assert loss.isfinite().all() and logprobs.grad.isfinite().all()

    def test_clip_fraction_counts_ratios_outside_of_the_range(self):
        ratios = torch.tensor([1.25, 1.15, 0.75, 0.85])  # both sides, in and out of 1 ± 0.2
        flags = ppo_policy_loss(
            PolicyTokens(ratios.log().requires_grad_(), torch.zeros(4), torch.ones(4)), 0.2
        ).metrics["clip_fraction"]
        assert flags.tolist() == [1, 0, 1, 0] and not flags.requires_grad

    def test_clip_higher_by_hand(self):
        # ε 0.2 below and 0.5 above: ratio 1.4 pays whole, 1.6 as 1.5, 0.7 costs as 0.8; on the way back all count
        ratios = torch.tensor([1.4, 1.6, 0.7, 1.6, 0.7])
        advantages = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
        loss = ppo_policy_loss(PolicyTokens(ratios.log(), torch.zeros(5), advantages), 0.2, 0.5)
        assert torch.allclose(loss.losses, -torch.tensor([1.4, 1.5, -0.8, -1.6, 0.7]))
        assert loss.metrics["clip_fraction"].tolist() == [0, 1, 1, 1, 1]
        with pytest.raises(ValueError, match=r"clip_range_high \(0.0\) must be more than 0 and finite, or null"):
            ppo_policy_loss(PolicyTokens(ratios.log(), torch.zeros(5), advantages), 0.2, 0.0)


IDS = torch.tensor([0, 0, 0, 1, 1])


def gradients(loss, logprobs, old, advantages, ids=IDS, **options):
    """Losses, metrics, and d losses.sum() / d logprobs."""
    logprobs = logprobs.clone().requires_grad_()
    given = loss(PolicyTokens(logprobs, old, advantages, ids), **options)
    given.losses.sum().backward()
    return given.losses.detach(), given.metrics, logprobs.grad


class TestPolicyGradientLoss:
    def test_by_hand(self):
        logprobs, old, advantages = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -1.0]), torch.tensor([2.0, -0.5])
        losses, metrics, gradient = gradients(policy_gradient_loss, logprobs, old, advantages, torch.tensor([0, 1]))
        assert losses.tolist() == [2.0, -1.0] and gradient.tolist() == [-2.0, 0.5]  # -A log π; -A
        assert metrics["ratio"].tolist() == pytest.approx([1.0, math.exp(-1)])

    def test_its_gradient_does_not_know_where_the_tokens_came_from(self):
        logprobs, advantages = randoms(5), randoms(5, seed=1)
        for old in (logprobs, randoms(5, seed=2)):
            assert torch.equal(gradients(policy_gradient_loss, logprobs, old, advantages)[2], -advantages)


class TestGSPOPolicyLoss:
    def test_by_hand(self):
        # log-ratios 0.3, 0, 0: mean 0.1; 0.2, -0.6: mean -0.2. Ratios 1.105 and 0.819 for all tokens of a response.
        old, logratios = torch.zeros(5), torch.tensor([0.3, 0.0, 0.0, 0.2, -0.6])
        advantages = torch.tensor([1.0, 1.0, 1.0, -2.0, -2.0])
        losses, metrics, gradient = gradients(
            gspo_policy_loss, logratios, old, advantages, clip_range=0.5, clip_range_high=None
        )
        first, second = math.exp(0.1), math.exp(-0.2)
        assert losses.tolist() == pytest.approx([-first] * 3 + [2 * second] * 2)
        assert gradient.tolist() == pytest.approx([-first] * 3 + [2 * second] * 2)
        assert metrics["ratio"].tolist() == pytest.approx([first] * 3 + [second] * 2)

    def test_its_gradient_is_that_of_the_response_as_one_action(self):
        # GSPO: (1/|y|) Σ_t of these is min(s A, clip(s) A) of a response, whose gradient is s A / |y| on each token.
        logprobs, old = randoms(5).requires_grad_(), randoms(5, seed=1)
        worth, lengths = torch.tensor([0.7, -1.3], dtype=torch.float64), torch.tensor([3.0, 2.0], dtype=torch.float64)
        sums = torch.zeros(2, dtype=torch.float64).index_add(0, IDS, logprobs - old)
        (-(sums / lengths).exp() * worth).sum().backward()
        tokens = PolicyTokens(logprobs.detach().clone().requires_grad_(), old, worth[IDS], IDS)
        (gspo_policy_loss(tokens, 100.0, 100.0).losses / lengths[IDS]).sum().backward()
        assert torch.allclose(tokens.logprobs.grad, logprobs.grad)

    def test_a_response_past_the_clip_has_no_gradient_on_any_token(self):
        logratios, advantages = torch.tensor([0.3, -0.1, 0.1, -0.5, 0.1]), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
        losses, metrics, gradient = gradients(gspo_policy_loss, logratios, torch.zeros(5), advantages)
        assert losses.tolist() == pytest.approx([-1.0004] * 3 + [0.9997] * 2)  # the paper's ε
        assert gradient.tolist() == [0.0] * 5 and metrics["clip_fraction"].tolist() == [1.0] * 5

    def test_tokens_that_do_not_say_whose_they_are_are_refused(self):
        tokens = PolicyTokens(torch.zeros(2), torch.zeros(2), torch.ones(2))
        with pytest.raises(ValueError, match="gspo_policy_loss needs sequence_ids"):
            gspo_policy_loss(tokens)


class TestCISPOPolicyLoss:
    def test_by_hand(self):
        # ratios 2, 8, ½ with a bound of 1 + 4: weights 2, 5, ½ of -A log π, and none is left out of the gradient
        old, ratios = torch.full((3,), -3.0), torch.tensor([2.0, 8.0, 0.5])
        advantages = torch.tensor([1.0, -1.0, 2.0])
        logprobs = old + ratios.log()
        losses, metrics, gradient = gradients(cispo_policy_loss, logprobs, old, advantages, torch.tensor([0, 1, 2]))
        assert gradient.tolist() == pytest.approx([-2.0, 5.0, -1.0])
        assert losses.tolist() == pytest.approx((gradient * logprobs).tolist())
        assert metrics["clip_fraction"].tolist() == [0, 1, 0]

    def test_a_bound_that_is_none_is_refused(self):
        with pytest.raises(ValueError, match=r"clip_range_high \(-0.1\) must be 0 or more"):
            cispo_policy_loss(PolicyTokens(torch.zeros(2), torch.zeros(2), torch.ones(2)), -0.1)


@pytest.mark.parametrize("loss", [policy_gradient_loss, ppo_policy_loss, gspo_policy_loss, cispo_policy_loss])
def test_the_first_gradient_of_every_loss_is_the_policy_gradient(loss):
    logprobs, advantages = randoms(5), randoms(5, seed=1)
    _, metrics, gradient = gradients(loss, logprobs, logprobs, advantages)
    assert torch.allclose(gradient, -advantages)
    assert torch.equal(metrics["ratio"], torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("logratio", [-100.0, 100.0])
@pytest.mark.parametrize("loss", [policy_gradient_loss, gspo_policy_loss, cispo_policy_loss])
def test_every_loss_and_its_gradient_are_finite_at_log_ratios_of_100(loss, logratio):
    losses, metrics, gradient = gradients(loss, torch.full((5,), logratio), torch.zeros(5), torch.ones(5))
    assert losses.isfinite().all() and gradient.isfinite().all() and metrics["ratio"].isfinite().all()


class TestValueLoss:
    def test_it_is_half_the_squared_error_without_a_clip_range(self):
        # (2 - 5)² / 2 = 4.5
        loss = value_loss(torch.tensor([2.0]), torch.tensor([0.0]), torch.tensor([5.0]), None)
        assert loss.item() == 4.5

    def test_it_is_zero_where_the_critic_was_and_is_right(self):
        values = randoms(5)
        assert torch.equal(value_loss(values, values, values, 0.2), torch.zeros(5, dtype=torch.float64))

    def test_hand_worked_numbers(self):
        # V_old = 0, clip 1. V = 3, R = 5: clipped to 1, errors 4 and 16, ½ 16 = 8.   V = 3, R = 0: errors 9 and 1, 4.5
        # V = 0.5, R = 2: inside, both errors 2.25, 1.125
        values, returns = torch.tensor([3.0, 3.0, 0.5]), torch.tensor([5.0, 0.0, 2.0])
        assert value_loss(values, torch.zeros(3), returns, 1.0).tolist() == [8.0, 4.5, 1.125]

    def test_it_has_no_gradient_for_moving_past_the_clip_towards_the_return(self):
        values = torch.tensor([3.0, 3.0], requires_grad=True)
        value_loss(values, torch.zeros(2), torch.tensor([5.0, 0.0]), 1.0).sum().backward()
        assert values.grad.tolist() == [0.0, 3.0]  # towards 5: nothing more to win; away from 0: the full V - R

    def test_a_wide_clip_range_changes_nothing(self):
        values, old, returns = randoms(20), randoms(20, seed=1), randoms(20, seed=2)
        assert torch.allclose(value_loss(values, old, returns, 1e6), value_loss(values, old, returns, None))


def test_a_sum_over_any_split_is_the_sum_over_the_whole():
    logprobs, old, advantages = randoms(12), randoms(12, seed=1), randoms(12, seed=2)
    whole = ppo_policy_loss(PolicyTokens(logprobs, old, advantages), 0.2).losses.sum()
    parts = [slice(0, 1), slice(1, 8), slice(8, 12)]
    assert torch.allclose(
        sum(ppo_policy_loss(PolicyTokens(logprobs[p], old[p], advantages[p]), 0.2).losses.sum() for p in parts), whole
    )
