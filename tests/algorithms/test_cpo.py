import pytest
import torch

from lit_rlhf import CPO
from lit_rlhf.losses import cpo_loss

OPTIONS = {"beta": 0.2, "nll_coef": 0.5}


def test_its_options_reach_the_loss_of_that_name(inputs):
    module = CPO(str(inputs / "model"), **OPTIONS)
    chosen, rejected = torch.tensor([-3.0, -2.0]), torch.tensor([-2.0, -5.0])
    lengths = torch.tensor([2.0, 4.0]), torch.tensor([3.0, 2.0])
    expected = cpo_loss(chosen, rejected, *lengths, **OPTIONS)
    assert torch.equal(module.losses_of(chosen, rejected, *lengths), expected)
    assert not torch.allclose(CPO(str(inputs / "model")).losses_of(chosen, rejected, *lengths), expected)


def test_its_rewards_are_what_the_loss_compares(inputs):
    module = CPO(str(inputs / "model"))
    logprobs, lengths = torch.tensor([-3.0, -2.0]), torch.tensor([2.0, 4.0])
    worth = module.reward_of(logprobs, lengths)
    assert worth.tolist() == pytest.approx([0.1 * -3.0, 0.1 * -2.0], rel=1e-5)
