import weakref

import pytest
import torch
from torch import nn

from lit_rlhf.engine.early_backward import backward_early


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))


def gradients(early, share=1.0, passes=1):
    """Of a loss whose second part is the network's, divided by its number."""
    net, other, weight = network(), nn.Parameter(torch.ones(7)), torch.tensor(0.3)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    for _ in range(passes):
        losses = net(torch.linspace(-1, 1, 35).view(7, 5))[:, 0].square()
        if early:
            losses = backward_early(losses, [*net.parameters(), other, frozen], weight * share)
        ((other.square() + 0.3 * losses).sum() * share).backward()
    assert frozen.grad is None
    return [parameter.grad for parameter in (*net.parameters(), other)]


@pytest.mark.parametrize("share", [1.0, 0.25])
@pytest.mark.parametrize("passes", [1, 3])
def test_gradients_are_those_of_one_backward_pass_to_the_bit(share, passes):
    for early, whole in zip(gradients(True, share, passes), gradients(False, share, passes), strict=True):
        assert torch.equal(early, whole)


def test_a_weight_that_turns_out_other_is_made_good():
    net, losses = network(), lambda net: net(torch.ones(4, 5))[:, 0].square()
    (3 * backward_early(losses(net), net.parameters(), torch.tensor(0.5)).sum()).backward()
    expected = network()
    (3 * losses(expected).sum()).backward()
    for made, right in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(made.grad, right.grad)


def test_what_the_network_kept_for_its_backward_pass_is_let_go_at_once():
    net, kept = network(), []

    def keep(tensor):
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = backward_early(net(torch.ones(4, 5))[:, 0].square(), net.parameters(), torch.tensor(1.0))
    own = {id(parameter) for parameter in net.parameters()}
    assert kept and all(ref() is None or id(ref()) in own for ref in kept)
    assert losses.requires_grad
