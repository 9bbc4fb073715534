"""The completions that are imitated and compared, by numbers worked out by hand."""

import pytest
import torch

from lit_rlhf.losses import ScoredRollout, best_and_worst, best_of_group
from lit_rlhf.losses.selection import best_of_n_kl

T, F = True, False
MASK = torch.tensor([[T, T, F], [T, F, F], [T, T, T], [T, T, F], [T, F, F]])
# Three completions of the first prompt, which return 1, 4 and 1; two of the second, which both return 2.
REWARDS = torch.tensor([[-0.5, 1.5, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 3.0], [-1.0, 3.0, 0.0], [1.0, 0.0, 0.0]])
ROLLOUT = ScoredRollout(REWARDS, None, MASK, group_index=torch.tensor([0, 1, 0, 1, 0]))


def on_tokens(*advantages):
    return torch.tensor(advantages)[:, None] * MASK


def test_the_best_alone_is_imitated_and_of_equals_the_first():
    assert torch.equal(best_of_group(ROLLOUT).advantages, on_tokens(0.0, 1.0, 1.0, 0.0, 0.0))


def test_best_and_worst_are_as_far_apart_as_their_returns_and_equals_do_not_count():
    assert torch.equal(best_and_worst(ROLLOUT).advantages, on_tokens(-1.5, 0.0, 1.5, 0.0, 0.0))


@pytest.mark.parametrize("count", [1, 2, 8, 64])
def test_the_kl_of_the_best_of_n_is_that_of_its_density_where_no_two_score_alike(count):
    # The best of N of the rank u, uniform in [0, 1], has the density N u^(N - 1): midpoints of a fine grid.
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    density = count * u ** (count - 1)
    assert best_of_n_kl(count) == pytest.approx(torch.xlogy(density, density).mean().item(), abs=1e-4)


def test_the_kl_of_the_best_of_n_is_a_bound_where_responses_are_few():
    probs = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)  # in order of their scores
    for count in (2, 4, 16):
        best = probs.cumsum(0) ** count - (probs.cumsum(0) - probs) ** count
        assert (best * (best / probs).log()).sum() < best_of_n_kl(count)


@pytest.mark.parametrize("estimator", [best_of_group, best_and_worst])
def test_a_group_of_one_is_refused(estimator):
    rollout = ROLLOUT._replace(group_index=torch.arange(5))
    with pytest.raises(ValueError, match=f"{estimator.__name__} compares completions of one prompt: 2 or more are"):
        estimator(rollout)
    with pytest.raises(ValueError, match=f"{estimator.__name__} compares .* needs the group_index of each"):
        estimator(rollout._replace(group_index=None))


@pytest.mark.parametrize("estimator", [best_of_group, best_and_worst])
def test_no_order_of_the_episodes_changes_what_differs(estimator):
    rewards = torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    rollout = ScoredRollout(rewards, None, torch.ones(8, 1, dtype=torch.bool), group_index=torch.arange(8) // 4)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = rollout._replace(token_rewards=rewards[order], group_index=rollout.group_index[order])
    assert torch.equal(estimator(moved).advantages, estimator(rollout).advantages[order])
