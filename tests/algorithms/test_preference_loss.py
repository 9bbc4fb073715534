import math
from functools import partial

import pytest
import torch

from lit_rlhf import UserError
from lit_rlhf.algorithms.preference_loss import LossTerm, PreferenceLoss
from lit_rlhf.losses import (
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    chosen_nll_loss,
    conservative_dpo_loss,
    discopop_loss,
    dpo_loss,
    exo_pair_loss,
    f_dpo_loss,
    forward_kl_dpo_loss,
    ipo_loss,
    length_normalized_dpo_loss,
    nca_pair_loss,
    robust_dpo_loss,
    rpo_loss,
    sppo_hard_loss,
)

PAIR = tuple(torch.randn(6, generator=torch.Generator().manual_seed(seed)) for seed in range(4))
LENGTHS = torch.tensor([3.0, 5.0, 2.0, 4.0, 1.0, 6.0])


def test_a_function_alone_is_a_mixture_of_one():
    assert torch.equal(PreferenceLoss(ipo_loss)(*PAIR, 0.3), ipo_loss(*PAIR, 0.3))


def test_a_mixture_is_the_weighted_sum_of_its_terms_with_their_own_options():
    loss = PreferenceLoss([LossTerm(dpo_loss, 0.8), LossTerm(conservative_dpo_loss, 0.2, {"label_smoothing": 0.1})])
    expected = 0.8 * dpo_loss(*PAIR, 0.3) + 0.2 * conservative_dpo_loss(*PAIR, 0.3, label_smoothing=0.1)
    assert torch.allclose(loss(*PAIR, 0.3), expected)


def test_dpo_and_the_likelihood_of_the_chosen_response_make_rpo():
    mixture = PreferenceLoss([LossTerm(dpo_loss), LossTerm(chosen_nll_loss, 0.5)])
    expected = rpo_loss(*PAIR, 0.3, chosen_lengths=LENGTHS, nll_coef=0.5)
    assert mixture.inputs == {"chosen_lengths"}
    assert torch.allclose(mixture(*PAIR, 0.3, chosen_lengths=LENGTHS), expected)


def test_only_terms_that_ask_for_lengths_get_them():
    loss = PreferenceLoss([LossTerm(dpo_loss), LossTerm(length_normalized_dpo_loss, 2.0)])
    expected = dpo_loss(*PAIR, 0.3) + 2 * length_normalized_dpo_loss(*PAIR, 0.3, LENGTHS, LENGTHS + 1)
    actual = loss(*PAIR, 0.3, chosen_lengths=LENGTHS, rejected_lengths=LENGTHS + 1, reward_shift=torch.tensor(9.0))
    assert torch.allclose(actual, expected)


def test_an_option_in_place_of_an_input_is_a_constant():
    loss = PreferenceLoss([LossTerm(bco_pair_loss, options={"reward_shift": 0.2})])
    assert loss.inputs == set()
    assert torch.allclose(loss(*PAIR, 0.3), bco_pair_loss(*PAIR, 0.3, reward_shift=0.2))


def test_a_partial_function_of_python_needs_no_options():
    loss = PreferenceLoss(partial(robust_dpo_loss, label_smoothing=0.2))
    assert torch.allclose(loss(*PAIR, 0.3), robust_dpo_loss(*PAIR, 0.3, 0.2))


def test_what_a_partial_function_has_bound_is_an_option_like_any_other():
    bound = PreferenceLoss(partial(bco_pair_loss, reward_shift=0.2))
    assert bound.inputs == set()  # the batch's running mean does not replace it
    assert torch.equal(bound(*PAIR, 0.3), bco_pair_loss(*PAIR, 0.3, reward_shift=0.2))
    with pytest.raises(UserError, match="bco_pair_loss rates each response against the reference"):
        PreferenceLoss(partial(bco_pair_loss, reward_shift=0.1), reference_free=True)
    with pytest.raises(
        UserError, match=r"likelihood of the chosen response 2 times: \['rpo_loss', 'chosen_nll_loss'\]"
    ):
        PreferenceLoss([LossTerm(partial(rpo_loss, nll_coef=0.3)), LossTerm(chosen_nll_loss)])


def test_the_same_loss_by_two_names_is_refused_and_one_loss_with_two_options_is_not():
    with pytest.raises(UserError, match="dpo_loss and f_dpo_loss, which are the same loss twice"):
        PreferenceLoss([LossTerm(dpo_loss), LossTerm(f_dpo_loss)])
    with pytest.raises(UserError, match="dpo_loss and robust_dpo_loss, which are the same"):
        PreferenceLoss([LossTerm(dpo_loss), LossTerm(robust_dpo_loss, options={"label_smoothing": 0.0})])
    assert PreferenceLoss([LossTerm(discopop_loss), LossTerm(discopop_loss, options={"temperature": 1.0})]).terms


def test_label_smoothing_is_refused_by_name_where_the_loss_would_ignore_it():
    with pytest.raises(UserError, match=r"dpo_loss would ignore label_smoothing \(0.1\): it takes no options") as error:
        PreferenceLoss([LossTerm(dpo_loss, options={"label_smoothing": 0.1})])
    for taker in (conservative_dpo_loss, robust_dpo_loss, exo_pair_loss):
        assert taker.__name__ in str(error.value)


REFUSED = {
    "unknown option": ([LossTerm(exo_pair_loss, options={"smoothing": 0.1})], "exo_pair_loss would ignore smoothing"),
    "missing option": (conservative_dpo_loss, "conservative_dpo_loss needs label_smoothing"),
    "option out of range": ([LossTerm(robust_dpo_loss, options={"label_smoothing": 0.7})], "label_smoothing (0.7)"),
    "no weight": ([LossTerm(dpo_loss, 0.0)], "the weight of dpo_loss (0.0) must be more than 0"),
    "no term": ([], "empty list"),
    "RPO twice": (
        [LossTerm(rpo_loss), LossTerm(chosen_nll_loss, 0.1)],
        "the likelihood of the chosen response 2 times: ['rpo_loss', 'chosen_nll_loss']",
    ),
    "a term twice": ([LossTerm(ipo_loss), LossTerm(dpo_loss), LossTerm(ipo_loss, 2.0)], "ipo_loss and ipo_loss"),
    "nothing but the likelihood": (chosen_nll_loss, "chosen_nll_loss alone would ignore beta, the reference"),
    "a weight without end": ([LossTerm(dpo_loss, math.inf)], "the weight of dpo_loss (inf)"),
    "a temperature of 0": ([LossTerm(discopop_loss, options={"temperature": 0.0})], "temperature (0.0)"),
    "a temperature below 0": ([LossTerm(discopop_loss, options={"temperature": -1.0})], "temperature (-1.0)"),
    "no number": ([LossTerm(discopop_loss, options={"temperature": math.nan})], "temperature (nan)"),
    "a likelihood that is lowered": ([LossTerm(rpo_loss, options={"nll_coef": -1.0})], "nll_coef (-1.0)"),
    "no shift": ([LossTerm(bco_pair_loss, options={"reward_shift": math.nan})], "bco_pair_loss with the options"),
    "a link by its name": (
        [LossTerm(f_dpo_loss, options={"link": "lit_rlhf.losses.forward_kl_link"})],
        "link ('lit_rlhf.losses.forward_kl_link') must be a function",
    ),
    "a mean": (lambda a, b, c, d, beta: dpo_loss(a, b, c, d, beta).mean(), "must give one loss per pair"),
    "a tuple": (lambda *args: (args[0], args[1]), "for three pairs it gave a tuple"),
    "no gradient": (lambda *args: dpo_loss(*args).detach(), "gives losses without a gradient"),
    "another signature": (lambda chosen, rejected: chosen - rejected, "positional arguments"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("wrong_types")
def test_what_makes_no_sense_is_refused_by_name(name):
    loss, words = REFUSED[name]
    with pytest.raises(UserError) as error:
        PreferenceLoss(loss)
    assert words in str(error.value)


def test_a_bug_in_a_loss_of_ones_own_is_named_with_its_place():
    def broken(chosen, rejected, ref_chosen, ref_rejected, beta):
        return chosen - rejcted  # noqa: F821

    line = broken.__code__.co_firstlineno + 1
    with pytest.raises(UserError, match=rf"raised NameError: name 'rejcted' .*, in .*test_preference_loss.py:{line}$"):
        PreferenceLoss(broken)


@pytest.mark.parametrize(
    "loss", [nca_pair_loss, bco_pair_loss, sppo_hard_loss, apo_zero_loss, apo_down_loss, forward_kl_dpo_loss]
)
def test_losses_that_rate_each_response_are_refused_without_a_reference(loss):
    with pytest.raises(UserError, match=rf"{loss.__name__} rates each response against the reference"):
        PreferenceLoss(loss, reference_free=True)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss, aot_loss])
def test_losses_of_margins_work_without_a_reference(loss):
    assert PreferenceLoss(loss, reference_free=True).terms
