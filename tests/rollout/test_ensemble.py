import numpy as np
import pytest
import torch

from lit_rlhf import EnsembleReward, RewardModel, RewardModelReward, UserError
from lit_rlhf.rollout.scoring import Rewards
from tests.tiny import save_tiny, tiny_tokenizer

PROMPTS = [np.array([3, 4, 5]), np.array([6])]
RESPONSES = [np.array([7, 8]), np.array([9, 10, 2])]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three reward models that agree about nothing."""
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "policy")
    for seed in range(3):
        torch.manual_seed(seed)
        module = RewardModel(str(root / "policy"), fresh_head=True)
        module.reward_model.model.save_pretrained(root / str(seed))
        module.tokenizer.save_pretrained(root / str(seed))
    return [str(root / str(seed)) for seed in range(3)]


def scored(reward):
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    return np.asarray(reward(PROMPTS, RESPONSES))


class Says:
    """A member whose scores are known."""

    def __init__(self, *values):
        self.values = np.array(values)

    def __call__(self, prompts, responses):
        return self.values


def test_the_penalty_is_k_standard_deviations_over_the_members(models):
    # of 1 and 3: mean 2, standard deviation √((1 + 1) / 2) = 1; of 4 and 4: no disagreement
    for coef, expected in ((0.0, [2.0, 4.0]), (1.0, [1.0, 4.0]), (2.5, [-0.5, 4.0]), (None, [1.0, 4.0])):
        reward = EnsembleReward(models[:2], coef)
        reward.members = [Says(1.0, 4.0), Says(3.0, 4.0)]
        assert reward(PROMPTS, RESPONSES).tolist() == expected


def test_its_members_score_as_each_does_alone(models):
    apart = np.stack([scored(RewardModelReward(model)) for model in models])
    spread = np.sqrt(((apart - apart.mean(0)) ** 2).sum(0) / 3)
    assert (spread > 1e-3).all()
    assert np.allclose(scored(EnsembleReward(models, 2.0)), apart.mean(0) - 2 * spread)
    assert np.allclose(scored(EnsembleReward(models, None)), apart.min(0))


def test_each_member_is_a_role_of_the_run_with_its_own_memory(models):
    rewards = Rewards(EnsembleReward(models[:2]))
    roles = rewards.views()
    assert list(roles) == ["reward 1", "reward 2"] and len(list(rewards.networks())) == 2
    assert roles["reward 1"] is not roles["reward 2"]
    (folders,) = rewards.stands_on().values()
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"models": ["a"]}, r"models \(.*a.*\) must be two reward models or more, each once; of one alone"),
        ({"models": ["a", "a"]}, "two reward models or more, each once"),
        ({"models": "a"}, r"models \('a'\) must be a list"),
        ({"models": ["a", "b"], "uncertainty_coef": -1.0}, r"uncertainty_coef \(-1.0\) must be 0 or more and finite"),
        ({"models": ["a", "b"], "uncertainty_coef": float("nan")}, r"uncertainty_coef \(nan\) must be 0 or more"),
    ],
)
def test_what_is_no_ensemble_is_refused_in_a_line(given, said):
    with pytest.raises(UserError, match=said):
        EnsembleReward(**given)
