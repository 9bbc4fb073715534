import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lit_rlhf import losses
from lit_rlhf.losses import (
    alpha_dpo_loss,
    alpha_link,
    aot_loss,
    aot_unpaired_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_pair_loss,
    bradley_terry_loss,
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
    offset_dpo_loss,
    reverse_kl_link,
    robust_dpo_loss,
    rpo_loss,
    sppo_hard_loss,
)

LOG2 = math.log(2)
ONE = torch.ones(1, dtype=torch.float64)

# Every loss of the family, with what it is when policy and reference agree (β = 0.5, log-probs -3 and -3, length 1).
FAMILY = {
    "dpo": (dpo_loss, LOG2),
    "conservative": (partial(conservative_dpo_loss, label_smoothing=0.1), LOG2),
    "robust": (partial(robust_dpo_loss, label_smoothing=0.1), LOG2),
    "offset": (partial(offset_dpo_loss, margin=math.log(3)), math.log(4)),  # log(1 + 3)
    "ipo": (ipo_loss, 1.0),  # (0 - 1/(2 * 0.5))²
    "hinge": (hinge_loss, 1.0),
    "exo": (partial(exo_pair_loss, label_smoothing=0.1), -LOG2 - 0.5 * math.log(0.9 * 0.1)),  # KL((½, ½)‖(0.9, 0.1))
    "nca": (nca_pair_loss, 2 * LOG2),
    "bco": (bco_pair_loss, 2 * LOG2),
    "sppo": (sppo_hard_loss, 2.0),  # (0 - 1)² + (0 + 1)²
    "aot": (aot_loss, LOG2),
    "aot_unpaired": (aot_unpaired_loss, LOG2),
    "apo_zero": (apo_zero_loss, 1.0),
    "apo_down": (apo_down_loss, 1.0),
    "discopop": (discopop_loss, 0.5 * (LOG2 + 1)),
    "length_normalized": (partial(length_normalized_dpo_loss, chosen_lengths=ONE, rejected_lengths=ONE), LOG2),
    "length_normalized_ipo": (partial(length_normalized_ipo_loss, chosen_lengths=ONE, rejected_lengths=ONE), 1.0),
    "rpo": (partial(rpo_loss, chosen_lengths=ONE), LOG2 + 3),
    "chosen_nll": (partial(chosen_nll_loss, chosen_lengths=ONE), 3.0),
    "f_reverse": (partial(f_dpo_loss, link=reverse_kl_link), LOG2),
    "f_forward": (partial(f_dpo_loss, link=forward_kl_link), LOG2),
    "f_jensen_shannon": (partial(f_dpo_loss, link=jensen_shannon_link), LOG2),
    "f_alpha": (partial(f_dpo_loss, link=alpha_link(0.5)), LOG2),
    "f_alpha_1": (partial(f_dpo_loss, link=alpha_link(1.0)), LOG2),
    "forward_kl": (forward_kl_dpo_loss, LOG2),
    "jensen_shannon": (jensen_shannon_dpo_loss, LOG2),
    "alpha": (partial(alpha_dpo_loss, alpha=0.5), LOG2),
}
every_loss = pytest.mark.parametrize("loss", [f for f, _ in FAMILY.values()], ids=list(FAMILY))


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def randoms(seed, n=6):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def at(loss, chosen_logratio, rejected_logratio, beta=0.5):
    """The loss as a function of the log-ratios alone."""
    zeros = torch.zeros_like(chosen_logratio)
    return loss(chosen_logratio, rejected_logratio, zeros, zeros, beta)


def argmin_margin(loss, beta):
    """Where on a fine grid of margins h_w - h_l, shared evenly, the loss is least."""
    margins = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    return margins[at(loss, margins / 2, -margins / 2, beta).argmin()].item()


def test_the_table_above_holds_every_preference_loss():
    tested = {getattr(loss, "func", loss) for loss, _ in FAMILY.values()}
    others = {"bradley_terry_loss", "ppo_policy_loss", "value_loss"}
    assert tested == {getattr(losses, name) for name in losses.__all__ if name.endswith("_loss") and name not in others}


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


@pytest.mark.parametrize("name", [name for name in FAMILY if not name.startswith(("aot", "length", "rpo", "chosen"))])
def test_a_pair_does_not_feel_its_neighbours(name):
    loss = FAMILY[name][0]
    quadruple = [randoms(seed) for seed in range(4)]
    whole = loss(*quadruple, 0.3)
    for i in range(6):
        assert torch.equal(loss(*(x[i : i + 1] for x in quadruple), 0.3), whole[i : i + 1])


@every_loss
def test_only_the_difference_to_the_reference_counts(loss):
    if getattr(loss, "func", None) in (rpo_loss, chosen_nll_loss):
        pytest.skip("its likelihood term is absolute on purpose")
    chosen, rejected, ref_chosen, ref_rejected = (randoms(seed) for seed in range(4))
    lengths = {name: x.expand(6) for name, x in getattr(loss, "keywords", {}).items() if name.endswith("lengths")}
    moved = loss(chosen - 7, rejected + 2, ref_chosen - 7, ref_rejected + 2, 0.3, **lengths)
    if loss is aot_loss:  # it compares quantiles of margins, which move by the same constant
        moved = loss(chosen - 7, rejected - 7, ref_chosen - 7, ref_rejected - 7, 0.3)
    assert torch.allclose(moved, loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, **lengths))


class TestOptima:
    @pytest.mark.parametrize("epsilon", [0.05, 0.2])
    def test_cdpo_is_least_at_a_margin_of_logit_over_beta(self, epsilon):
        loss = partial(conservative_dpo_loss, label_smoothing=epsilon)
        assert argmin_margin(loss, 0.4) == pytest.approx(math.log((1 - epsilon) / epsilon) / 0.4, abs=1e-3)

    @pytest.mark.parametrize("epsilon", [0.05, 0.2])
    def test_exo_is_zero_at_a_margin_of_logit_over_beta(self, epsilon):
        loss = partial(exo_pair_loss, label_smoothing=epsilon)
        optimum = math.log((1 - epsilon) / epsilon) / 0.4
        assert argmin_margin(loss, 0.4) == pytest.approx(optimum, abs=1e-3)
        assert at(loss, column(optimum), column(0), 0.4).item() == pytest.approx(0, abs=1e-12)

    @pytest.mark.parametrize("beta", [0.1, 0.5])
    def test_ipo_is_zero_at_a_margin_of_one_over_two_beta(self, beta):
        assert argmin_margin(ipo_loss, beta) == pytest.approx(1 / (2 * beta), abs=1e-3)
        assert at(ipo_loss, column(1 / (2 * beta)), column(0), beta).item() == pytest.approx(0)

    def test_sppo_asks_for_opposite_log_ratios(self):
        chosen, rejected = column(0.3).requires_grad_(), column(-0.1).requires_grad_()
        optimizer = torch.optim.SGD([chosen, rejected], lr=0.4)
        for _ in range(50):
            optimizer.zero_grad()
            at(sppo_hard_loss, chosen, rejected, 0.25).sum().backward()
            optimizer.step()
        assert (chosen.item(), rejected.item()) == pytest.approx((2.0, -2.0))

    def test_nca_stops_raising_the_chosen_response_at_an_implicit_reward_of_log_2(self):
        chosen = torch.linspace(-5, 5, 10_001, dtype=torch.float64)
        best = chosen[at(nca_pair_loss, chosen, torch.zeros_like(chosen), 0.5).argmin()].item()
        assert 0.5 * best == pytest.approx(LOG2, abs=1e-3)

    def test_hinge_has_no_gradient_once_the_margin_is_one_over_beta(self):
        chosen = column(1.9, 2.1).requires_grad_()
        at(hinge_loss, chosen, column(0, 0), 0.5).sum().backward()
        assert chosen.grad.tolist() == [-0.5, 0.0]

    def test_dpo_under_bradley_terry_labels_is_least_where_the_implicit_reward_is_the_reward(self):
        # Labels drawn with P(first wins) = σ(Δr), Δr = 1.3: the mean loss over both labels, β = 0.2.
        margins = torch.linspace(-20, 20, 40_001, dtype=torch.float64)
        p = 1 / (1 + math.exp(-1.3))
        zeros = torch.zeros_like(margins)
        mean_loss = p * at(dpo_loss, margins, zeros, 0.2) + (1 - p) * at(dpo_loss, zeros, margins, 0.2)
        assert 0.2 * margins[mean_loss.argmin()].item() == pytest.approx(1.3, abs=1e-3)


class TestLimits:
    """Losses without an optimum, on free log-ratios: where gradient descent takes them."""

    @staticmethod
    def descend(loss, start, steps=4000, learning_rate=1.0, beta=0.5):
        """Log-ratios (chosen, rejected) after these steps of plain gradient descent from `start`, two columns."""
        logratios = torch.stack(start).requires_grad_()
        for _ in range(steps):
            (gradient,) = torch.autograd.grad(at(loss, *logratios, beta).sum(), logratios)
            logratios = (logratios - learning_rate * gradient).detach().requires_grad_()
        return logratios.detach(), at(loss, *logratios, beta).detach()

    STARTS = (randoms(0), randoms(1))

    def test_apo_zero_raises_chosen_and_lowers_rejected_without_end(self):
        chosen, rejected = (x.clone().requires_grad_() for x in self.STARTS)
        at(apo_zero_loss, chosen, rejected).sum().backward()
        assert (chosen.grad < 0).all() and (rejected.grad > 0).all()  # wherever they are, each by itself
        (chosen, rejected), end = self.descend(apo_zero_loss, self.STARTS)
        assert chosen.min() > 10 and rejected.max() < -10 and end.max() < 0.01  # its infimum is 0

    def test_apo_down_lowers_rejected_first_then_chosen_too_while_the_margin_grows(self):
        # At the reference σ' of both terms is the same: chosen stands, rejected falls.
        chosen, rejected = column(0).requires_grad_(), column(0).requires_grad_()
        at(apo_down_loss, chosen, rejected).sum().backward()
        assert chosen.grad.item() == 0 and rejected.grad.item() == pytest.approx(0.5 / 4)
        (chosen, rejected), end = self.descend(apo_down_loss, (torch.zeros(1), torch.zeros(1)), steps=200)
        assert rejected.item() < chosen.item() - 5 < -5
        (chosen, rejected), end = self.descend(apo_down_loss, self.STARTS)
        assert chosen.max() < -5 and (rejected < chosen - 5).all() and end.max() < 0.05  # its infimum is 0

    @pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
    def test_aot_ends_where_one_distribution_dominates_the_other_quantile_by_quantile(self, loss):
        (chosen, rejected), end = self.descend(loss, self.STARTS, steps=1000)
        if loss is aot_loss:  # the policy's margins over the reference's, which are 0 here
            assert (chosen - rejected).min() > 10
        else:
            assert (chosen.sort().values - rejected.sort().values).min() > 10
        assert end.max() < 0.01  # its infimum is 0

    @pytest.mark.parametrize("loss", [aot_loss, aot_unpaired_loss])
    def test_aot_is_dpo_on_one_pair_and_no_more_than_dpo_on_many(self, loss):
        pairs = tuple(randoms(seed, 32) for seed in range(4))
        for i in range(32):
            pair = tuple(x[i : i + 1] for x in pairs)
            assert torch.allclose(loss(*pair, 0.3), dpo_loss(*pair, 0.3))
        assert loss(*pairs, 0.3).mean() < dpo_loss(*pairs, 0.3).mean() - 0.01


class TestEquivalences:
    """The same number from another road."""

    pair = tuple(randoms(seed) for seed in range(4))
    reward_margin = 0.3 * ((pair[0] - pair[2]) - (pair[1] - pair[3]))

    def test_cdpo_is_cross_entropy_with_soft_labels(self):
        expected = F.binary_cross_entropy_with_logits(
            self.reward_margin, torch.full_like(self.reward_margin, 0.85), reduction="none"
        )
        assert torch.allclose(conservative_dpo_loss(*self.pair, 0.3, 0.15), expected)

    def test_robust_dpo_averages_to_dpo_over_flipped_labels(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        kept = robust_dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.3, 0.15)
        flipped = robust_dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.3, 0.15)
        assert torch.allclose(0.85 * kept + 0.15 * flipped, dpo_loss(*self.pair, 0.3))

    @pytest.mark.parametrize("smoothed", [conservative_dpo_loss, robust_dpo_loss])
    def test_label_smoothing_of_zero_is_dpo(self, smoothed):
        assert torch.allclose(smoothed(*self.pair, 0.3, 0.0), dpo_loss(*self.pair, 0.3))

    def test_dpo_is_the_reward_models_loss_on_implicit_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        constant = 4.2  # β log Z(x): the same for both responses
        rewards = (0.3 * (chosen - ref_chosen) + constant, 0.3 * (rejected - ref_rejected) + constant)
        assert torch.allclose(bradley_terry_loss(*rewards), dpo_loss(*self.pair, 0.3))

    def test_dpo_gradient_weighs_a_pair_by_how_wrong_its_order_is(self):
        chosen, rejected = (x.clone().requires_grad_() for x in self.pair[:2])
        dpo_loss(chosen, rejected, *self.pair[2:], 0.3).sum().backward()
        wrong = torch.sigmoid(-self.reward_margin)  # what the implicit reward gives to the other order
        assert torch.allclose(chosen.grad, -0.3 * wrong)
        assert torch.allclose(rejected.grad, 0.3 * wrong)

    def test_label_smoothing_changes_the_loss(self):
        assert not torch.allclose(conservative_dpo_loss(*self.pair, 0.3, 0.1), dpo_loss(*self.pair, 0.3))

    def test_exo_is_the_kl_from_the_policys_preference_to_the_smoothed_label(self):
        policy = torch.distributions.Bernoulli(logits=self.reward_margin)
        label = torch.distributions.Bernoulli(probs=torch.tensor(0.9, dtype=torch.float64))
        expected = torch.distributions.kl_divergence(policy, label)
        assert torch.allclose(exo_pair_loss(*self.pair, 0.3, 0.1), expected)

    def test_bco_with_the_right_shift_ignores_a_constant_in_the_rewards(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        moved = bco_pair_loss(chosen + 2, rejected + 2, ref_chosen, ref_rejected, 0.3, reward_shift=0.6)
        assert torch.allclose(moved, bco_pair_loss(*self.pair, 0.3))

    @pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
    def test_aot_is_the_cheapest_coupling_of_its_two_samples(self, name):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        u, v = {
            "aot": (chosen - rejected, ref_chosen - ref_rejected),
            "aot_unpaired": (chosen - ref_chosen, rejected - ref_rejected),
        }[name]
        # Kantorovich by brute force: over all 720 ways to pair the two samples, with a convex cost.
        cheapest = min(
            sum(math.log1p(math.exp(-0.3 * (a - b))) for a, b in zip(u.tolist(), order, strict=True))
            for order in itertools.permutations(v.tolist())
        )
        assert FAMILY[name][0](*self.pair, 0.3).sum().item() == pytest.approx(cheapest)

    def test_unpaired_aot_does_not_care_who_was_paired_with_whom(self):
        chosen, rejected, ref_chosen, ref_rejected = self.pair
        other = torch.tensor([3, 0, 5, 1, 4, 2])
        shuffled = aot_unpaired_loss(chosen, rejected[other], ref_chosen, ref_rejected[other], 0.3)
        assert torch.equal(shuffled, aot_unpaired_loss(*self.pair, 0.3))

    def test_discopop_is_logistic_below_and_exponential_above_zero(self):
        low, high = (at(discopop_loss, column(h), column(0), 1.0).item() for h in (-3.0, 3.0))
        assert low == pytest.approx(-math.log(1 / (1 + math.exp(3))))
        assert high == pytest.approx(math.exp(-3))

    def test_discopop_has_a_hump_around_the_reference(self):
        # The paper names the local optimum -2.3714 in units of τ = 0.05: z = -0.11857.
        z = torch.linspace(-0.5, 0.05, 55_001, dtype=torch.float64)
        assert z[at(discopop_loss, z, torch.zeros_like(z), 1.0).argmin()].item() == pytest.approx(-0.11857, abs=1e-4)

    def test_length_normalisation_is_dpo_on_averages(self):
        lengths = column(3, 5, 2, 4, 1, 6)
        averaged = dpo_loss(*(x / lengths for x in self.pair), 0.3)
        assert torch.allclose(length_normalized_dpo_loss(*self.pair, 0.3, lengths, lengths), averaged)

    def test_rpo_gradient_never_lowers_the_chosen_response(self):
        chosen = column(-3.0).requires_grad_()
        rpo_loss(chosen, column(-50.0), column(-3.0), column(-3.0), 0.5, column(4)).sum().backward()
        assert chosen.grad.item() == pytest.approx(-1 / 4)  # DPO's part is done; 1 per token is left

    def test_alpha_divergence_spans_reverse_and_forward_kl(self):
        dpo, forward = dpo_loss(*self.pair, 0.3), f_dpo_loss(*self.pair, 0.3, link=forward_kl_link)
        assert torch.allclose(f_dpo_loss(*self.pair, 0.3, link=alpha_link(1e-6)), dpo, atol=1e-5)
        assert torch.allclose(f_dpo_loss(*self.pair, 0.3, link=alpha_link(1.0)), forward)
        assert not torch.allclose(forward, dpo)

    def test_each_link_is_the_derivative_of_its_divergence(self):
        # f(u) = u log u; -log u; u log u - (1 + u) log((1 + u)/2); (u^(1-α) - (1-α) u - α)/(α (α - 1)) at α = ½
        generators = {
            reverse_kl_link: lambda u: u * u.log(),
            forward_kl_link: lambda u: -u.log(),
            jensen_shannon_link: lambda u: u * u.log() - (1 + u) * ((1 + u) / 2).log(),
            alpha_link(0.5): lambda u: (u.sqrt() - 0.5 * u - 0.5) / -0.25,
        }
        for link, generator in generators.items():
            u = torch.linspace(0.2, 3, 8, dtype=torch.float64).requires_grad_()
            (slope,) = torch.autograd.grad(generator(u).sum(), u)
            difference = slope - link(u.log())
            assert torch.allclose(difference, difference[0])  # up to a constant, which cancels in the loss


class TestLinksPastTheClamp:
    """exp(20) is the largest that is taken; a link whose f' is steeper than that goes on as a straight line."""

    every_steep_link = pytest.mark.parametrize(
        ("link", "edge", "plain"),
        [
            (forward_kl_link, -20.0, lambda h: -torch.exp(-h)),
            (alpha_link(0.5), -40.0, lambda h: -torch.expm1(-0.5 * h) / 0.5),
            (alpha_link(1.0), -20.0, lambda h: -torch.expm1(-h)),
        ],
        ids=["forward_kl", "alpha_0.5", "alpha_1"],
    )

    @staticmethod
    def value_and_slope(link, logratios):
        logratios = logratios.clone().requires_grad_()
        values = link(logratios)
        return values.detach(), *torch.autograd.grad(values.sum(), logratios)

    @every_steep_link
    def test_up_to_the_clamp_they_are_the_plain_formula_to_the_bit(self, link, edge, plain):
        logratios = torch.cat([torch.linspace(edge, 100, 1001), column(edge, 0).float()])
        for ours, theirs in zip(
            self.value_and_slope(link, logratios), self.value_and_slope(plain, logratios), strict=True
        ):
            assert torch.equal(ours, theirs)

    @every_steep_link
    def test_past_it_they_keep_the_slope_and_value_of_the_edge(self, link, edge, plain):
        (value,), (slope,) = self.value_and_slope(plain, column(edge))
        values, slopes = self.value_and_slope(link, column(edge - 1e-9, edge - 5, -100))
        assert torch.allclose(slopes, slope)
        assert torch.allclose(values, value - slope * column(1e-9, 5, edge + 100))

    @every_steep_link
    @pytest.mark.parametrize("ahead", [1.0, 25.0])  # by how many nats the rejected response is
    def test_a_chosen_response_that_the_policy_gave_up_is_pulled_back(self, link, edge, plain, ahead):
        chosen = torch.tensor([edge - 5], requires_grad=True)
        at(partial(f_dpo_loss, link=link), chosen, chosen.detach() + ahead, 0.1).sum().backward()
        assert chosen.grad.item() < 0 and chosen.grad.isfinite()


@pytest.mark.parametrize("loss", [conservative_dpo_loss, robust_dpo_loss, exo_pair_loss])
@pytest.mark.parametrize("label_smoothing", [-0.1, 0.5, 1.0])
def test_label_smoothing_out_of_range_is_refused_by_name(loss, label_smoothing):
    with pytest.raises(ValueError, match=r"label_smoothing \("):
        loss(ONE, ONE, ONE, ONE, 0.1, label_smoothing)


def test_exo_refuses_hard_labels_by_name():
    with pytest.raises(ValueError, match=r"label_smoothing \(0.0\) must be in \(0, 0.5\)"):
        exo_pair_loss(ONE, ONE, ONE, ONE, 0.1, 0.0)


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_alpha_out_of_range_is_refused_by_name(alpha):
    with pytest.raises(ValueError, match="alpha"):
        alpha_link(alpha)
