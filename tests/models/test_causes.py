import pytest
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from lit_rlhf.models.causes import difference, first_difference, said, silent_transformers, watched
from tests.tiny import tiny_model


def test_a_difference_is_a_share_of_the_largest_number():
    assert difference(torch.tensor([1.0, 4.5]), torch.tensor([1.0, -5.0])) == pytest.approx(9.5 / 5)


def test_the_first_part_that_differs_is_named_with_its_kind_and_place():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        with watched(model) as own:
            model(ids)
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
        with watched(model) as ours:
            model(ids)
    assert first_difference(own, ours, model) == ", first in LlamaMLP (layers.1.mlp)"
    assert first_difference(own, own, model) == ""
    assert not any(module._forward_hooks for module in model.modules())


def test_outputs_that_are_no_row_for_each_token_are_left_out():
    own = {"layers.0.mlp": [torch.ones(5, 4), torch.ones(5, 3)]}  # of a convolution over tokens, say
    assert first_difference(own, {"layers.0.mlp": [torch.zeros(5, 7)]}, tiny_model()) == ""


class Broken(nn.Module):
    def forward(self, x):
        raise ValueError("no\nmore")


def test_an_error_is_told_in_a_line_with_the_module_in_which_it_came_up():
    with pytest.raises(ValueError, match="no") as error:
        nn.Sequential(nn.Identity(), Broken())(1)
    assert said(error.value) == "ValueError in Broken: no"
    assert said(KeyError()) == "KeyError: "


def test_transformers_is_silent_only_meanwhile():
    before = transformers_logging.get_verbosity()
    with pytest.raises(KeyError), silent_transformers():
        assert transformers_logging.get_verbosity() == transformers_logging.ERROR
        raise KeyError
    assert transformers_logging.get_verbosity() == before
