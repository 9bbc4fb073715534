import pytest
import torch

from lit_rlhf.losses import (
    chosen_nll_loss,
    dpo_loss,
    ipo_loss,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    rpo_loss,
)
from tests.losses.family import column, randoms

PAIR = tuple(randoms(seed) for seed in range(4))


def test_length_normalisation_is_dpo_on_averages():
    lengths = column(3, 5, 2, 4, 1, 6)
    averaged = dpo_loss(*(x / lengths for x in PAIR), 0.3)
    assert torch.allclose(length_normalized_dpo_loss(*PAIR, 0.3, lengths, lengths), averaged)


def test_rpo_gradient_never_lowers_the_chosen_response():
    chosen = column(-3.0).requires_grad_()
    rpo_loss(chosen, column(-50.0), column(-3.0), column(-3.0), 0.5, column(4)).sum().backward()
    assert chosen.grad.item() == pytest.approx(-1 / 4)  # DPO's part is done; 1 per token is left


def test_length_normalised_ipo_is_ipo_on_averages_and_the_likelihood_of_the_chosen_response_a_part_of_rpo():
    lengths = column(3, 5, 2, 4, 1, 6)
    averaged = ipo_loss(*(x / lengths for x in PAIR), 0.3)
    assert torch.allclose(length_normalized_ipo_loss(*PAIR, 0.3, lengths, lengths), averaged)
    parts = dpo_loss(*PAIR, 0.3) + 0.5 * chosen_nll_loss(*PAIR, 0.3, lengths)
    assert torch.allclose(rpo_loss(*PAIR, 0.3, lengths, 0.5), parts)


@pytest.mark.parametrize("coefficient", [-0.1, float("inf"), float("nan")])
def test_a_weight_of_the_likelihood_that_is_none_is_refused_by_name(coefficient):
    with pytest.raises(ValueError, match=r"nll_coef \("):
        rpo_loss(*PAIR, 0.3, column(3, 5, 2, 4, 1, 6), coefficient)
