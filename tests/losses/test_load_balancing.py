import math

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lit_rlhf.losses import load_balancing_loss


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_it_is_k_where_all_experts_are_equally_busy_and_e_where_the_same_ones_do_all(top_k):
    busy = torch.eye(4).repeat(3, 1) if top_k == 1 else torch.eye(4) + torch.eye(4).roll(1, 0) * (top_k == 2)
    assert load_balancing_loss(busy * 1e-3, top_k).item() == pytest.approx(top_k, rel=1e-3)
    alone = torch.where(torch.arange(4) < top_k, 30.0, 0.0).expand(6, 4)
    assert load_balancing_loss(alone, top_k).item() == pytest.approx(4)


def test_it_is_what_the_working_gives():
    # Two tokens, two experts: probabilities (3/4, 1/4) twice; both go to the first: f = (1, 0), P = (3/4, 1/4).
    logits = torch.tensor([[math.log(3), 0.0]] * 2)
    assert load_balancing_loss(logits, 1).item() == pytest.approx(2 * 1 * 3 / 4)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_over_layers_it_is_that_of_transformers(top_k):
    layers = tuple(torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32))
    ours = load_balancing_loss(torch.cat(layers), top_k)
    torch.testing.assert_close(ours, load_balancing_loss_func(layers, 4, top_k))


def test_its_gradient_takes_work_from_the_expert_that_has_most():
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 4, requires_grad=True)
    load_balancing_loss(logits, 1).backward()
    assert (logits.grad[:, 0] > 0).all() and (logits.grad[:, 1:] < 0).all()


@pytest.mark.parametrize("top_k", [0, 4])
def test_more_experts_than_there_are_cannot_be_sent_to(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k} of 3 experts"):
        load_balancing_loss(torch.zeros(2, 3), top_k)
