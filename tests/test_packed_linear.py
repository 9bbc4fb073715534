import pytest
import torch
from torch import nn

from lit_rlhf import packed_linear
from lit_rlhf.packed_linear import can_pack, packed_linears
from lit_rlhf.packing import pack
from lit_rlhf.rollout import GenerationSettings, play
from tests.test_rollout import make_env
from tests.tiny import random_examples, tiny_policy

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize("rows", [(5,), (3, 1), (1, 7), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_give_the_same_products(rows, bias):
    layer, x = nn.Linear(24, 70, bias=bias), torch.randn(*rows, 24)
    with torch.no_grad(), packed_linears(layer):
        packed = layer(x)
    torch.testing.assert_close(packed, layer(x), rtol=1e-5, atol=1e-5)


def test_layers_are_as_before_afterwards_and_learn_again():
    policy, batch = tiny_policy(), pack(random_examples(3))
    names = list(policy.state_dict())
    with pytest.raises(KeyboardInterrupt), packed_linears(policy):
        raise KeyboardInterrupt
    assert not any("forward" in vars(module) for module in policy.modules())
    assert list(policy.state_dict()) == names
    policy(batch)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_a_layer_that_does_more_than_multiply_stays_as_it_is():
    class Adapted(nn.Linear):  # as LoRA does
        def forward(self, x):
            return super().forward(x) + 1

    layers = nn.Sequential(nn.Linear(8, 8), Adapted(8, 8))
    x = torch.randn(2, 8)
    with torch.no_grad(), packed_linears(layers):
        assert ["forward" in vars(layer) for layer in layers] == [True, False]
        packed = layers(x)
    torch.testing.assert_close(packed, layers(x), rtol=1e-5, atol=1e-5)


def test_other_precisions_are_left_alone():
    assert can_pack(nn.Linear(4, 4))
    assert not can_pack(nn.Linear(4, 4).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_pack(nn.Linear(4, 4))


def test_a_rollout_packs_the_weights_that_it_starts_with(monkeypatch):
    policy, env, weights = tiny_policy(), make_env(), []
    real = packed_linear.packed_forward

    def watched(layer):
        weights.append(layer.weight.detach().clone())
        return real(layer)

    monkeypatch.setattr(packed_linear, "packed_forward", watched)
    play(policy, env, GenerationSettings(), 4, env_seed=0)
    before = len(weights)
    assert before == sum(isinstance(module, nn.Linear) for module in policy.modules())
    with torch.no_grad():  # an optimiser's step
        for parameter in policy.parameters():
            parameter.mul_(0.9)
    play(policy, env, GenerationSettings(), 4)
    for old, new in zip(weights[:before], weights[before:], strict=True):
        torch.testing.assert_close(new, 0.9 * old)
