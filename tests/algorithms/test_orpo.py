import pytest
import torch

from lit_rlhf import ORPO
from lit_rlhf.losses import orpo_loss

OPTIONS = {"odds_coef": 0.25}


def test_its_options_reach_the_loss_of_that_name(inputs):
    module = ORPO(str(inputs / "model"), **OPTIONS)
    chosen, rejected = torch.tensor([-3.0, -2.0]), torch.tensor([-2.0, -5.0])
    lengths = torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0])
    expected = orpo_loss(chosen, rejected, *lengths, **OPTIONS)
    assert torch.equal(module.losses_of(chosen, rejected, *lengths), expected)
    assert not torch.allclose(ORPO(str(inputs / "model")).losses_of(chosen, rejected, *lengths), expected)


def test_its_rewards_are_what_the_loss_compares(inputs):
    module = ORPO(str(inputs / "model"))
    logprobs, lengths = torch.tensor([-3.0, -2.0]), torch.tensor([2.0, 4.0])
    worth = module.reward_of(logprobs, lengths)
    assert worth.tolist() == pytest.approx([-1.247518, 0.432752], rel=1e-5)
