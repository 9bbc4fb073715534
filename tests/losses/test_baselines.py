"""Estimators without a critic, by numbers worked out by hand and by what must hold of any."""

import math

import pytest
import torch

from lit_rlhf.losses import ScoredRollout, dr_grpo, gae, grpo, reinforce, reinforce_plus_plus, remax, rloo
from lit_rlhf.losses.advantages import token_rewards

T, F = True, False
MASK = torch.tensor([[T, T, F], [T, F, F], [T, T, T], [T, T, F]])
# Two prompts, the responses of which stand in turn: returns 1 and 4 of the first, 2 and 2 of the second.
REWARDS = torch.tensor([[-0.5, 1.5, 0.0], [2.0, 0.0, 0.0], [0.0, 1.0, 3.0], [-1.0, 3.0, 0.0]])
GROUPS = torch.tensor([0, 1, 0, 1])
ROLLOUT = ScoredRollout(
    REWARDS,
    None,
    MASK,
    torch.tensor([1.5, 2.0, 4.0, 3.0]),
    GROUPS,
    GROUPS,
    torch.tensor(2.25),
    torch.tensor([1.0, 2.0, 1.0, 2.0]),
)
TO_GO = torch.tensor([[1.0, 1.5, 0.0], [2.0, 0.0, 0.0], [4.0, 4.0, 3.0], [2.0, 3.0, 0.0]])
IN_GROUPS = [rloo, grpo, dr_grpo]


def on_tokens(*advantages):
    return torch.tensor(advantages)[:, None] * MASK


def equal(actual, expected):
    torch.testing.assert_close(actual, expected)


class TestByHand:
    def test_reinforce(self):
        equal(reinforce(ROLLOUT, baseline="none").advantages, TO_GO)
        equal(reinforce(ROLLOUT).advantages, (TO_GO - 2.25) * MASK)
        # γ = ½: -0.5 + ½ 1.5 = 0.25; 0 + ½ (1 + ½ 3) = 1.25, 1 + 1.5 = 2.5; -1 + 1.5 = 0.5
        half = torch.tensor([[0.25, 1.5, 0.0], [2.0, 0.0, 0.0], [1.25, 2.5, 3.0], [0.5, 3.0, 0.0]])
        equal(reinforce(ROLLOUT, 0.5, "none").advantages, half)

    def test_rloo(self):  # 1 - 4, 2 - 2, 4 - 1, 2 - 2
        equal(rloo(ROLLOUT).advantages, on_tokens(-3.0, 0.0, 3.0, 0.0))

    def test_grpo(self):  # mean 2.5, standard deviation of a sample √(2 · 1.5²) = 2.1213
        a = 1.5 / (math.sqrt(4.5) + 1e-4)
        equal(grpo(ROLLOUT).advantages, on_tokens(-a, 0.0, a, 0.0))

    def test_dr_grpo(self):
        equal(dr_grpo(ROLLOUT).advantages, on_tokens(-1.5, 0.0, 1.5, 0.0))

    def test_reinforce_plus_plus(self):
        equal(reinforce_plus_plus(ROLLOUT).advantages, TO_GO)
        means = torch.tensor([2.5, 2.0, 2.5, 2.0])[:, None]
        equal(reinforce_plus_plus(ROLLOUT, group_baseline=True).advantages, (TO_GO - means) * MASK)

    def test_remax(self):
        equal(remax(ROLLOUT).advantages, (TO_GO - torch.tensor([[1.0], [2.0], [1.0], [2.0]])) * MASK)

    def test_three_of_a_group(self):  # returns 0, 3, 6: others' means 4.5, 3, 1.5; standard deviation 3
        rewards = torch.tensor([[0.0], [3.0], [6.0]])
        rollout = ScoredRollout(
            rewards, None, torch.ones(3, 1, dtype=torch.bool), group_index=torch.zeros(3, dtype=torch.int64)
        )
        assert rloo(rollout).advantages.flatten().tolist() == [-4.5, 0.0, 4.5]
        assert dr_grpo(rollout).advantages.flatten().tolist() == [-3.0, 0.0, 3.0]
        equal(grpo(rollout).advantages.flatten(), torch.tensor([-1.0, 0.0, 1.0]) * 3 / 3.0001)


@pytest.mark.parametrize("estimator", [reinforce, *IN_GROUPS, reinforce_plus_plus, remax])
def test_returns_are_the_reward_to_go_whatever_the_baseline_and_masked_cells_change_nothing(estimator):
    expected = estimator(ROLLOUT)
    equal(expected.returns, TO_GO)
    dirty = ROLLOUT._replace(token_rewards=torch.where(MASK, REWARDS, 1e6))
    for ours, theirs in zip(estimator(dirty), expected, strict=True):
        assert torch.equal(ours, theirs) and (ours[~MASK] == 0).all() and ours.dtype == torch.float32


def test_reinforce_with_a_critic_is_gae_with_lambda_1():
    rollout = ROLLOUT._replace(values=torch.rand(4, 3) * MASK)
    for ours, theirs in zip(reinforce(rollout, 0.9, "critic"), gae(rollout, 0.9, 1.0), strict=True):
        assert torch.equal(ours, theirs)


def random_groups(size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    count = 5 * size
    lengths = torch.randint(1, 7, (count,), generator=generator)
    mask = torch.arange(6) < lengths[:, None]
    kl = torch.rand(count, 6, generator=generator)
    scores = torch.randn(count, generator=generator)
    group_index = torch.arange(5).repeat(size)[torch.randperm(count, generator=generator)]
    return ScoredRollout(token_rewards(scores, kl, 0.1, mask), None, mask, scores, group_index, group_index)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_estimators_agree_with_a_loop_over_groups(size):
    rollout = random_groups(size)
    returns = rollout.token_rewards.double().sum(1)
    ours = {e: e(rollout).advantages for e in IN_GROUPS}
    for i in range(len(returns)):
        group = [j for j in range(len(returns)) if rollout.group_index[j] == rollout.group_index[i]]
        others = [returns[j].item() for j in group if j != i]
        of_group = returns[group]
        expected = {
            rloo: returns[i].item() - sum(others) / len(others),
            grpo: ((returns[i] - of_group.mean()) / (of_group.std() + 1e-4)).item(),
            dr_grpo: (returns[i] - of_group.mean()).item(),
        }
        for estimator, value in expected.items():
            tokens = ours[estimator][i][rollout.response_mask[i]]
            assert tokens.tolist() == pytest.approx([value] * len(tokens), abs=1e-5)
    equal(ours[rloo] * (size - 1) / size, ours[dr_grpo])


@pytest.mark.parametrize("estimator", IN_GROUPS)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1e6 / 3])
def test_a_group_of_equal_rewards_has_no_advantage_and_no_nan(estimator, reward):
    mask = torch.ones(7, 2, dtype=torch.bool)
    rollout = ScoredRollout(torch.full((7, 2), reward / 2), None, mask, group_index=torch.zeros(7, dtype=torch.int64))
    assert estimator(rollout).advantages.abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["rloo", "grpo", "dr_grpo", "reinforce_plus_plus"])
def test_a_group_of_one_is_refused_by_those_that_compare(name):
    estimator = {e.__name__: e for e in IN_GROUPS}.get(name, lambda r: reinforce_plus_plus(r, group_baseline=True))
    alone = ROLLOUT._replace(group_index=torch.tensor([0, 1, 0, 2]))
    with pytest.raises(ValueError, match=rf"^{name}[\w ]* compares completions of one prompt: 2 or more are needed$"):
        estimator(alone)
    with pytest.raises(ValueError, match=rf"^{name}[\w ]* compares .* needs the group_index of each$"):
        estimator(ROLLOUT._replace(group_index=None))


def test_what_a_rollout_does_not_have_is_asked_for_by_name():
    bare = ROLLOUT._replace(running_mean=None, greedy_scores=None)
    with pytest.raises(ValueError, match="running_mean needs the mean return of the run so far"):
        reinforce(bare)
    with pytest.raises(ValueError, match="remax needs the scores of greedy responses"):
        remax(bare)
    with pytest.raises(ValueError, match="needs the values of a critic"):
        reinforce(bare, baseline="critic")
    with pytest.raises(ValueError, match=r"epsilon \(0.0\) must be more than 0"):
        grpo(ROLLOUT, epsilon=0.0)


def test_unknown_baselines_are_refused(wrong_types):
    with pytest.raises(ValueError, match=r"baseline \(mean\) must be none, running_mean or critic"):
        reinforce(ROLLOUT, baseline="mean")
