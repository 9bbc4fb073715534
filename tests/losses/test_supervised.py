import math

import pytest
import torch

from lit_rlhf.losses import bradley_terry_loss, centring_loss, nll, process_reward_loss


def randoms(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestSupervised:
    def test_nll_of_a_uniform_policy_over_four_tokens_is_log_4(self):
        logprobs = torch.log_softmax(torch.zeros(5, 4), dim=-1)[:, 0]
        assert torch.allclose(nll(logprobs), torch.full((5,), math.log(4)))

    def test_bradley_terry_loss_is_log_2_where_scores_are_equal(self):
        scores = randoms(7)
        assert torch.allclose(bradley_terry_loss(scores, scores), torch.full((7,), math.log(2), dtype=torch.float64))

    def test_bradley_terry_loss_is_the_surprise_at_the_label(self):
        # Odds e^(2-1) : 1 for chosen, so P(chosen) = e/(e + 1) = 0.731059 and -log of it is 0.313262.
        assert bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(0.313262, abs=1e-6)

    def test_bradley_terry_margin_is_the_difference_that_counts_as_a_tie(self):
        chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.5])
        assert torch.allclose(bradley_terry_loss(chosen, rejected, chosen - rejected), torch.full((2,), math.log(2)))

    def test_bradley_terry_ignores_a_constant_added_to_both_scores(self):
        chosen, rejected = randoms(6), randoms(6, seed=1)
        assert torch.allclose(bradley_terry_loss(chosen + 5, rejected + 5), bradley_terry_loss(chosen, rejected))

    def test_bradley_terry_stays_finite_for_hopeless_pairs(self):
        chosen = torch.tensor([-500.0], requires_grad=True)
        loss = bradley_terry_loss(chosen, torch.tensor([500.0]))
        loss.sum().backward()
        assert loss.item() == 1000.0 and chosen.grad.item() == -1.0

    def test_centring_pulls_both_scores_of_a_pair_the_same_way_and_leaves_their_difference(self):
        # (2 + 1)² = 9, of slope 2 · 3 = 6 in both; 1 and -1 are centred
        chosen, rejected = torch.tensor([2.0, 1.0]).requires_grad_(), torch.tensor([1.0, -1.0]).requires_grad_()
        losses = centring_loss(chosen, rejected)
        assert losses.tolist() == [9.0, 0.0]
        slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
        assert [slope.tolist() for slope in slopes] == [[6.0, 0.0], [6.0, 0.0]]

    def test_process_reward_loss_is_the_surprise_at_the_label(self):
        # σ(1) = 0.731059: -log of it is 0.313262 where the step is right, -log 0.268941 = 1.313262 where it is wrong,
        # and a fourth of the one with three of the other where one in four judges says right: 1.063262
        scores, labels = torch.ones(3), torch.tensor([1.0, 0.0, 0.25])
        expected = torch.tensor([0.313262, 1.313262, 1.063262])
        torch.testing.assert_close(process_reward_loss(scores, labels), expected, atol=1e-6, rtol=0)

    def test_process_reward_loss_is_least_where_the_score_says_the_label(self):
        scores = torch.tensor([0.25]).logit().requires_grad_()
        loss = process_reward_loss(scores, torch.tensor([0.25]))
        loss.sum().backward()
        assert loss.item() == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
        assert scores.grad.item() == pytest.approx(0, abs=1e-7)
