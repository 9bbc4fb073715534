import pytest
import torch

from lit_rlhf import SimPO
from lit_rlhf.losses import simpo_loss

OPTIONS = {"beta": 2.5, "target_margin": 1.25, "nll_coef": 0.5}


def test_its_options_reach_the_loss_of_that_name(inputs):
    module = SimPO(str(inputs / "model"), **OPTIONS)
    chosen, rejected = torch.tensor([-3.0, -2.0]), torch.tensor([-2.0, -5.0])
    lengths = torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0])
    expected = simpo_loss(chosen, rejected, *lengths, **OPTIONS)
    assert torch.equal(module.losses_of(chosen, rejected, *lengths), expected)
    assert not torch.allclose(SimPO(str(inputs / "model")).losses_of(chosen, rejected, *lengths), expected)


def test_its_rewards_are_what_the_loss_compares(inputs):
    module = SimPO(str(inputs / "model"))
    logprobs, lengths = torch.tensor([-3.0, -2.0]), torch.tensor([2.0, 4.0])
    worth = module.reward_of(logprobs, lengths)
    assert worth.tolist() == pytest.approx([2.0 * -1.5, 2.0 * -0.5], rel=1e-5)
