"""What holds for every preference loss, and one pair worked out by hand for each."""

from functools import partial
from inspect import signature

import pytest
import torch

from lit_rlhf import losses
from lit_rlhf.losses import (
    alpha_dpo_loss,
    alpha_link,
    aot_loss,
    aot_unpaired_loss,
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
    forward_kl_link,
    hinge_loss,
    ipo_loss,
    jensen_shannon_dpo_loss,
    jensen_shannon_link,
    length_normalized_dpo_loss,
    length_normalized_ipo_loss,
    nca_pair_loss,
    robust_dpo_loss,
    rpo_loss,
    sppo_hard_loss,
    wpo_loss,
)
from tests.losses.family import FAMILY, column, randoms

every_loss = pytest.mark.parametrize("loss", [f for f, _ in FAMILY.values()], ids=list(FAMILY))


def test_the_family_holds_every_preference_loss():
    tested = {getattr(loss, "func", loss) for loss, _ in FAMILY.values()}
    exported = (getattr(losses, name) for name in losses.__all__ if name.endswith("_loss"))
    public = {loss for loss in exported if "ref_chosen_logprobs" in signature(loss).parameters}
    assert tested == public, "give it a row in tests/losses/family.py"


@pytest.mark.parametrize(("loss", "expected"), FAMILY.values(), ids=list(FAMILY))
def test_value_when_policy_and_reference_agree(loss, expected):
    logprobs = column(-3.0)
    assert loss(logprobs, logprobs, logprobs, logprobs, 0.5).item() == pytest.approx(expected)


# One pair worked out by hand: log π(y_w) = -1, log π(y_l) = -4, reference -2 and -2.5, β = 0.5. So
# h_w = 1, h_l = -1.5, z = 0.5 * 2.5 = 1.25; σ(z) = 0.777300, -log σ(z) = 0.251929, -log σ(-z) = 1.501929.
BY_HAND = {
    "dpo": (dpo_loss, 0.251929),
    # 0.9 * 0.251929 + 0.1 * 1.501929
    "conservative": (partial(conservative_dpo_loss, label_smoothing=0.1), 0.376929),
    # (0.9 * 0.251929 - 0.1 * 1.501929) / 0.8
    "robust": (partial(robust_dpo_loss, label_smoothing=0.1), 0.095679),
    # (2.5 - 1)²
    "ipo": (ipo_loss, 2.25),
    # 1 - 1.25 < 0
    "hinge": (hinge_loss, 0.0),
    # 0.777300 (-0.251929 - log 0.9) + 0.222700 (-1.501929 - log 0.1)
    "exo": (partial(exo_pair_loss, label_smoothing=0.1), 0.064379),
    # -log σ(0.5) - ½ log σ(-0.5) - ½ log σ(0.75) = 0.474077 + 0.487038 + 0.193436
    "nca": (nca_pair_loss, 1.154551),
    # δ = 0.1: -log σ(0.4) - log σ(0.85) = 0.513015 + 0.355865
    "bco": (partial(bco_pair_loss, reward_shift=0.1), 0.868880),
    # (1 - 1)² + (-1.5 + 1)²
    "sppo": (sppo_hard_loss, 0.25),
    # one pair: u = -1 + 4 = 3, v = -2 + 2.5 = 0.5, -log σ(0.5 * 2.5)
    "aot": (aot_loss, 0.251929),
    # u = 1, v = -1.5
    "aot_unpaired": (aot_unpaired_loss, 0.251929),
    # σ(-0.5) + σ(-0.75) = 0.377541 + 0.320821
    "apo_zero": (apo_zero_loss, 0.698362),
    # σ(0.5) + σ(-1.25) = 0.622459 + 0.222700
    "apo_down": (apo_down_loss, 0.845159),
    # τ = 1: 0.222700 * 0.251929 + 0.777300 * e^-1.25
    "discopop": (partial(discopop_loss, temperature=1.0), 0.278805),
    # 1/2 - (-1.5)/3 = 1: -log σ(0.5)
    "length_normalized": (
        partial(length_normalized_dpo_loss, chosen_lengths=column(2), rejected_lengths=column(3)),
        0.474077,
    ),
    # (1 - 1)²
    "length_normalized_ipo": (
        partial(length_normalized_ipo_loss, chosen_lengths=column(2), rejected_lengths=column(3)),
        0.0,
    ),
    # 1/2
    "chosen_nll": (partial(chosen_nll_loss, chosen_lengths=column(2)), 0.5),
    # 0.251929 + 0.5 * 1/2
    "rpo": (partial(rpo_loss, chosen_lengths=column(2), nll_coef=0.5), 0.501929),
    # e^(-1/2 - 4/4) · 0.251929
    "wpo": (partial(wpo_loss, chosen_lengths=column(2), rejected_lengths=column(4)), 0.223130 * 0.251929),
    # -e^-1 + e^1.5 = 4.113810: -log σ(2.056905)
    "f_forward": (partial(f_dpo_loss, link=forward_kl_link), 0.120312),
    # log σ(1) - log σ(-1.5) = 1.388152: -log σ(0.694076)
    "f_jensen_shannon": (partial(f_dpo_loss, link=jensen_shannon_link), 0.405155),
    # α = ½: 2 (1 - e^-0.5) - 2 (1 - e^0.75) = 3.020939: -log σ(1.510469)
    "f_alpha": (partial(f_dpo_loss, link=alpha_link(0.5)), 0.199512),
    "forward_kl": (forward_kl_dpo_loss, 0.120312),
    "jensen_shannon": (jensen_shannon_dpo_loss, 0.405155),
    "alpha": (partial(alpha_dpo_loss, alpha=0.5), 0.199512),
}


@pytest.mark.parametrize(("loss", "expected"), BY_HAND.values(), ids=list(BY_HAND))
def test_hand_worked_numbers(loss, expected):
    actual = loss(column(-1), column(-4), column(-2), column(-2.5), 0.5)
    assert actual.item() == pytest.approx(expected, abs=2e-6)


@every_loss
def test_a_step_down_the_gradient_from_the_reference_raises_chosen_over_rejected(loss):
    if loss is discopop_loss:
        pytest.skip("it rises at the reference, see test_discopop_has_a_hump_around_the_reference")
    chosen, rejected = column(-3.0).requires_grad_(), column(-3.0).requires_grad_()
    loss(chosen, rejected, column(-3.0), column(-3.0), 0.5).sum().backward()
    if getattr(loss, "func", None) is chosen_nll_loss:  # it knows nothing of the rejected one
        assert chosen.grad.item() < 0 and rejected.grad is None
        return
    assert -chosen.grad.item() > -rejected.grad.item()
    assert rejected.grad.item() > 0


@every_loss
@pytest.mark.parametrize("logratio", [-100.0, 100.0])
def test_value_and_gradient_are_finite_at_log_ratios_of_100(loss, logratio):
    chosen = torch.tensor([logratio], requires_grad=True)
    rejected = torch.tensor([-logratio], requires_grad=True)
    value = loss(chosen, rejected, torch.zeros(1), torch.zeros(1), 1.0)
    value.sum().backward()
    gradients = [x.grad for x in (chosen, rejected) if x.grad is not None]
    assert value.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    "name", [name for name in FAMILY if not name.startswith(("aot", "length", "rpo", "chosen", "wpo"))]
)
def test_a_pair_does_not_feel_its_neighbours(name):
    loss = FAMILY[name][0]
    quadruple = [randoms(seed) for seed in range(4)]
    whole = loss(*quadruple, 0.3)
    for i in range(6):
        assert torch.equal(loss(*(x[i : i + 1] for x in quadruple), 0.3), whole[i : i + 1])


@every_loss
def test_only_the_difference_to_the_reference_counts(loss):
    if getattr(loss, "func", None) in (rpo_loss, chosen_nll_loss, wpo_loss):
        pytest.skip("its likelihood term, or weight, is absolute on purpose")
    chosen, rejected, ref_chosen, ref_rejected = (randoms(seed) for seed in range(4))
    lengths = {name: x.expand(6) for name, x in getattr(loss, "keywords", {}).items() if name.endswith("lengths")}
    moved = loss(chosen - 7, rejected + 2, ref_chosen - 7, ref_rejected + 2, 0.3, **lengths)
    if loss is aot_loss:  # it compares quantiles of margins, which move by the same constant
        moved = loss(chosen - 7, rejected - 7, ref_chosen - 7, ref_rejected - 7, 0.3)
    assert torch.allclose(moved, loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, **lengths))
