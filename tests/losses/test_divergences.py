from functools import partial

import pytest
import torch

from lit_rlhf.losses import alpha_link, dpo_loss, f_dpo_loss, forward_kl_link, jensen_shannon_link, reverse_kl_link
from tests.losses.family import at, column, randoms


class TestEquivalences:
    """The same number from another road."""

    pair = tuple(randoms(seed) for seed in range(4))

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


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_alpha_out_of_range_is_refused_by_name(alpha):
    with pytest.raises(ValueError, match="alpha"):
        alpha_link(alpha)
