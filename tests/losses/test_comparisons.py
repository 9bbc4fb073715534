"""Losses of a reward model, worked by hand."""

import math

import pytest
import torch

from lit_rlhf.losses import (
    bradley_terry_loss,
    centring_loss,
    rao_kupper_loss,
    scaled_bradley_terry_loss,
    score_difference_loss,
)
from tests.losses.random_tensors import randoms


def test_bradley_terry_loss_is_log_2_where_scores_are_equal():
    scores = randoms(7)
    assert torch.allclose(bradley_terry_loss(scores, scores), torch.full((7,), math.log(2), dtype=torch.float64))


def test_bradley_terry_loss_is_the_surprise_at_the_label():
    # Odds e^(2-1) : 1 for chosen, so P(chosen) = e/(e + 1) = 0.731059 and -log of it is 0.313262.
    assert bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0])).item() == pytest.approx(0.313262, abs=1e-6)


def test_bradley_terry_margin_is_the_difference_that_counts_as_a_tie():
    chosen, rejected = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 0.5])
    assert torch.allclose(bradley_terry_loss(chosen, rejected, chosen - rejected), torch.full((2,), math.log(2)))


def test_bradley_terry_ignores_a_constant_added_to_both_scores():
    chosen, rejected = randoms(6), randoms(6, seed=1)
    assert torch.allclose(bradley_terry_loss(chosen + 5, rejected + 5), bradley_terry_loss(chosen, rejected))


def test_bradley_terry_stays_finite_for_hopeless_pairs():
    chosen = torch.tensor([-500.0], requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([500.0]))
    loss.sum().backward()
    assert loss.item() == 1000.0 and chosen.grad.item() == -1.0


def test_centring_pulls_both_scores_of_a_pair_the_same_way_and_leaves_their_difference():
    # (2 + 1)² = 9, of slope 2 · 3 = 6 in both; 1 and -1 are centred
    chosen, rejected = torch.tensor([2.0, 1.0]).requires_grad_(), torch.tensor([1.0, -1.0]).requires_grad_()
    losses = centring_loss(chosen, rejected)
    assert losses.tolist() == [9.0, 0.0]
    slopes = torch.autograd.grad(losses.sum(), (chosen, rejected))
    assert [slope.tolist() for slope in slopes] == [[6.0, 0.0], [6.0, 0.0]]


def test_a_pair_of_margin_3_counts_as_three_of_margin_1():
    chosen, rejected = randoms(4), randoms(4, seed=1)
    plain = bradley_terry_loss(chosen, rejected)
    torch.testing.assert_close(scaled_bradley_terry_loss(chosen, rejected, torch.full_like(plain, 3.0)), 3 * plain)
    assert not scaled_bradley_terry_loss(chosen, rejected, torch.zeros_like(plain)).any()


def test_regression_is_least_where_scores_differ_as_the_ratings_do():
    # (2 - 0.5 - 1)² = 0.25, of slope 2 · 0.5 = 1 in chosen and -1 in rejected
    chosen, rejected = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([0.5, 1.0], requires_grad=True)
    losses = score_difference_loss(chosen, rejected, torch.tensor([1.0, 2.0]))
    assert losses.tolist() == [0.25, 0.0]
    assert [slope.tolist() for slope in torch.autograd.grad(losses.sum(), (chosen, rejected))] == [[1, 0], [-1, 0]]


def test_ties_are_the_rest_of_the_probability_whatever_the_scores():
    scores, others = 3 * randoms(50), 3 * randoms(50, seed=1)
    for threshold in (0.1, math.log(2), 2.0):
        won, tie = torch.ones(50), torch.zeros(50)
        parts = [
            rao_kupper_loss(scores, others, won, threshold),
            rao_kupper_loss(others, scores, won, threshold),
            rao_kupper_loss(scores, others, tie, threshold),
        ]
        torch.testing.assert_close(sum((-part).exp() for part in parts), torch.ones(50, dtype=torch.float64))


def test_equal_responses_tie_once_in_three_at_the_threshold_of_log_2():
    # σ(-log 2) = 1/3 for either side
    none, won = torch.zeros(2), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(rao_kupper_loss(none, none, won), torch.full((2,), math.log(3)))


def test_without_ties_and_threshold_rao_kupper_is_bradley_terry():
    chosen, rejected = randoms(5), randoms(5, seed=1)
    torch.testing.assert_close(
        rao_kupper_loss(chosen, rejected, torch.ones(5), 1e-9), bradley_terry_loss(chosen, rejected), atol=1e-8, rtol=0
    )


def test_ties_pull_scores_together_and_wins_apart():
    chosen, rejected = torch.tensor([1.0, 1.0], requires_grad=True), torch.zeros(2)
    (slopes,) = torch.autograd.grad(rao_kupper_loss(chosen, rejected, torch.tensor([0.0, 1.0])).sum(), chosen)
    assert slopes[0] > 0 > slopes[1]


def test_a_model_of_true_ties_is_learnt_where_bradley_terry_of_ties_called_by_chance_is_biased():
    difference, threshold = 1.0, 1.0
    won = 1 / (1 + math.exp(threshold - difference))
    lost = 1 / (1 + math.exp(threshold + difference))
    shares = torch.tensor([won, lost, 1 - won - lost], dtype=torch.float64)

    def minimised(loss):
        d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([d], max_iter=100, tolerance_grad=1e-10)

        def closure():
            optimizer.zero_grad()
            value = loss(d)
            value.backward()
            return value

        optimizer.step(closure)
        return d.item()

    none, one = torch.zeros(1, dtype=torch.float64), torch.ones(1)
    found = minimised(
        lambda d: (
            shares[0] * rao_kupper_loss(d, none, one, threshold).sum()
            + shares[1] * rao_kupper_loss(none, d, one, threshold).sum()
            + shares[2] * rao_kupper_loss(d, none, 0 * one, threshold).sum()
        )
    )
    split = minimised(
        lambda d: (
            (shares[0] + shares[2] / 2) * bradley_terry_loss(d, none).sum()
            + (shares[1] + shares[2] / 2) * bradley_terry_loss(none, d).sum()
        )
    )
    # 0.5 of the pairs are won, 0.119 lost, 0.381 tied: log(0.690 / 0.310) = 0.802
    assert found == pytest.approx(1, abs=1e-5) and split == pytest.approx(0.802, abs=1e-3)


@pytest.mark.parametrize("threshold", [0.0, -1.0, math.inf, math.nan])
def test_a_threshold_that_leaves_no_room_for_ties_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold"):
        rao_kupper_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), threshold)
