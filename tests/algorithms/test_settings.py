"""Settings hold their defaults and refuse what is out of range, by name and value."""

import re

import pytest
from torch import nn

from lit_rlhf import PPO, KLPenalty, UserError
from lit_rlhf.algorithms.kl_control import KLController
from lit_rlhf.algorithms.settings import OptimizerSettings


def test_a_controller_without_a_coefficient_is_refused(folder):
    with pytest.raises(UserError, match=r"model\.kl: KLController has no kl_coef; name FixedKL or AdaptiveKL"):
        PPO(str(folder), kl=KLController())


def test_defaults_are_those_of_the_checklist(folder):
    module = PPO(str(folder))
    assert module.advantages.keywords == {"gamma": 1.0, "gae_lambda": 0.95}
    assert module.loss.keywords == {"clip_range": 0.2}
    assert (module.critic_settings.value_clip_range, module.updates.target_kl) == (0.2, None)
    assert module.optimizer_settings.adam_eps == 1e-5
    assert module.kl_penalty == KLPenalty("reward", "k1")
    assert not module.shaping.whiten


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("clip_range", -1.0),
        ("clip_range", float("inf")),
        ("value_clip_range", 0.0),
        ("value_clip_range", float("nan")),
        ("value_coef", -0.1),
        ("value_coef", float("inf")),
        ("entropy_coef", -5.0),
        ("entropy_coef", float("nan")),
        ("gamma", 1.1),
        ("gae_lambda", 7.0),
        ("critic_learning_rate", -1e-3),
        ("learning_rate", float("nan")),
        ("weight_decay", -0.1),
        ("adam_betas", (0.9, 1.0)),
        ("adam_eps", -1e-8),
        ("adam_eps", 1e30),
        ("learning_rate", float("inf")),
        ("weight_decay", float("inf")),
        ("warmup_steps", float("inf")),
        ("warmup_steps", float("nan")),
        ("warmup_steps", 1.5),
        ("warmup_steps", -1),
        ("warmup_steps", -0.5),
        ("adam_eps", 0.0),
        ("adam_eps", 1e-50),
        ("weight_decay", 1e9),
        ("critic_learning_rate", float("inf")),
        ("target_kl", float("inf")),
        ("temperature", 0.0),
        ("ppo_epochs", 0),
        ("num_minibatches", 0),
        ("critic_warmup", -1),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name_and_value(folder, option, value):
    with pytest.raises(UserError, match=re.escape(f"{option} ({value}) must be ")):
        PPO(str(folder), **{option: value})


def test_matrices_decay_vectors_do_not_and_no_group_is_empty():
    settings = OptimizerSettings(1e-3, 0.1, (0.9, 0.95), 1e-8, "constant", 0.0)
    frozen, linear = nn.Linear(2, 3).requires_grad_(False), nn.Linear(2, 3)
    both = settings.groups([*frozen.parameters(), *linear.parameters()], 1e-2)
    assert [(group["params"], group["weight_decay"], group["lr"]) for group in both] == [
        ([linear.weight], 0.1, 1e-2),
        ([linear.bias], 0.0, 1e-2),
    ]
    assert len(settings.groups([linear.weight], 1e-2)) == 1 and settings.groups(frozen.parameters(), 1e-2) == []
