"""DAPO: the parts of its paper, and where each is."""

import pytest
import torch

from lit_rlhf import DAPO, RewardShaping
from lit_rlhf.losses import grpo, ppo_policy_loss
from tests.ppo_runs import record, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, DAPO) > 0.9


def test_defaults(folder):
    module = DAPO(str(folder))
    assert module.advantages.func is grpo and module.loss.func is ppo_policy_loss
    assert module.loss.keywords == {"clip_range": 0.2, "clip_range_high": 0.28}
    assert module.updates.loss_average == "tokens" and module.kl.kl_coef == 0
    assert module.sampling.dynamic_sampling == 10


def test_every_token_weighs_the_same(folder, tmp_path):
    module = record(folder, tmp_path, kind=DAPO, num_minibatches=2, data={"group_size": 4})
    assert all(batch.weights is None for batch, _ in module.seen)
    assert all(batch.denominator == len(batch.advantages) for batch, _ in module.seen)


def test_the_length_penalty_of_rewards_is_the_soft_overlong_punishment():
    """Eq. 13 with L_max = 20 and L_cache = 5, worked out for some lengths."""
    lengths = torch.tensor([3, 15, 16, 18, 20])
    expected = [0.0, 0.0, (15 - 16) / 5, (15 - 18) / 5, -1.0]
    shaping = RewardShaping(length_penalty=1 / 5, length_budget=15)
    scores = shaping.scores(torch.zeros(5), lengths, lengths == 20)
    assert scores.tolist() == pytest.approx(expected)
