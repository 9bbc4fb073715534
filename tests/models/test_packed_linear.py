from contextlib import nullcontext

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from lit_rlhf.engine.packing import pack
from lit_rlhf.models import packed_linear
from lit_rlhf.models.packed_linear import MOST_ROWS, can_pack, packed_linears
from lit_rlhf.rollout.play import GenerationSettings, play
from tests.rollout.test_play import make_env
from tests.tiny import random_examples, tiny_policy

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")


@pytest.mark.parametrize("rows", [(5,), (3, 1), (1, 7), (0,)])
@pytest.mark.parametrize("layer", [nn.Linear(24, 70), nn.Linear(24, 70, bias=False), Conv1D(70, 24)], ids=str)
def test_packed_layers_give_the_same_products(rows, layer):
    x = torch.randn(*rows, 24)
    with torch.no_grad(), packed_linears(layer):
        assert "forward" in vars(layer)
        packed = layer(x)
    torch.testing.assert_close(packed, layer(x), rtol=1e-5, atol=1e-5)


class Kernels(TorchDispatchMode):
    """Counts the products by oneDNN's own kernels."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.mkldnn._linear_pointwise.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layer", [nn.Linear(24, 70), Conv1D(70, 24)], ids=str)
def test_no_kernel_is_made_and_kept_for_each_number_of_rows_of_a_prefill(layer):
    with torch.no_grad(), packed_linears(layer), Kernels() as kernels:
        for rows in ((MOST_ROWS,), (MOST_ROWS // 2, 2), (1, MOST_ROWS + 1), (MOST_ROWS, 9)):
            layer(torch.randn(*rows, 24))
    assert kernels.count == 2
    x = torch.randn(MOST_ROWS + 1, 24)
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


def test_layers_are_packed_in_the_precisions_that_the_kernel_has(monkeypatch):
    layer = nn.Linear(4, 4)
    assert can_pack(layer) and not can_pack(nn.Linear(4, 4).double()) and not can_pack(nn.Linear(4, 4).half())
    for bfloat16 in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda answer=bfloat16: answer)
        assert can_pack(nn.Linear(4, 4).bfloat16()) is bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert can_pack(layer) is bfloat16


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this CPU has no bfloat16 for oneDNN")
@pytest.mark.parametrize("layer", [nn.Linear(24, 70), nn.Linear(24, 70, bias=False), Conv1D(70, 24)], ids=str)
def test_layers_packed_under_autocast_give_its_products(layer):
    x = torch.randn(5, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Kernels() as kernels:
        with packed_linears(layer):
            packed = layer(x)
        plain = layer(x)
    assert kernels.count == 1 and packed.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(packed, plain, rtol=2e-2, atol=2e-2)


class Casts(TorchDispatchMode):
    """Counts conversions of weights."""

    def __init__(self, network):
        super().__init__()
        self.weights = {weight.data_ptr() for weight in network.parameters() if weight.ndim == 2}
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.weights
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_rollout_in_mixed_precision_casts_each_weight_once_and_gives_the_same_distribution(monkeypatch, architecture):
    policy, plays, casts = tiny_policy(architecture), [], []
    for ready in (True, False):
        if not ready:
            monkeypatch.setattr("lit_rlhf.rollout.play.packed_linears", nullcontext)
        with MixedPrecision("bf16-mixed", "cpu").forward_context(), Casts(policy) as counted:
            plays.append(play(policy, make_env(), GenerationSettings(), 11, env_seed=0))
        casts.append(counted.count)
    assert casts[0] == sum(isinstance(module, nn.Linear | Conv1D) for module in policy.modules()) < casts[1]
    ours, theirs = ([episode.response_ids.tolist() for episode in made.episodes] for made in plays)
    alike = [number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a == b]
    assert len(alike) > 0.8 * len(ours)  # the kernel rounds sums otherwise
    for number in alike:
        a, b = (made.sampled_logprobs[number] for made in plays)
        torch.testing.assert_close(a, b, rtol=0, atol=0.05)


def test_a_rollout_packs_the_weights_that_it_starts_with(monkeypatch):
    policy, env, weights = tiny_policy(), make_env(), []
    real = packed_linear.packed_forward

    def watched(weight, bias):
        weights.append(weight.clone())
        return real(weight, bias)

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
