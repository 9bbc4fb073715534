import math

import pytest
import torch

from lit_rlhf.errors import UserError
from lit_rlhf.losses.kl import AdaptiveKL, FixedKL, KLPenalty, clamped_logratio, k1, k2, k3, with_k2_gradient

# A categorical policy and reference over 8 tokens; expectations below are sums over all tokens, no sampling.
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(8, generator=GENERATOR, dtype=torch.float64)
REF_LOGPROBS = torch.log_softmax(torch.randn(8, generator=GENERATOR, dtype=torch.float64), dim=0)
LOGPROBS = torch.log_softmax(LOGITS, dim=0)
P = LOGPROBS.exp()


def exact_kl(logprobs, ref_logprobs):
    return torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=logprobs), torch.distributions.Categorical(logits=ref_logprobs)
    )


def randn_like_logits():
    return torch.randn(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def mean_and_variance(estimator, logprobs=LOGPROBS, ref_logprobs=REF_LOGPROBS):
    values, p = estimator(logprobs, ref_logprobs), logprobs.exp()
    mean = (p * values).sum()
    return mean.item(), (p * (values - mean).square()).sum().item()


def mean_gradient(estimate):
    """E_π[∇ estimate] over the logits, the samples' distribution held fixed."""
    logits = LOGITS.clone().requires_grad_()
    values = estimate(torch.log_softmax(logits, dim=0), REF_LOGPROBS)
    (gradient,) = torch.autograd.grad((P * values).sum(), logits)
    return gradient


def exact_gradient(divergence):
    logits = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(divergence(torch.log_softmax(logits, dim=0)), logits)
    return gradient


class TestEstimators:
    @pytest.mark.parametrize("estimator", [k1, k2, k3])
    def test_it_is_zero_where_policy_and_reference_agree(self, estimator):
        assert torch.equal(estimator(LOGPROBS, LOGPROBS), torch.zeros(8, dtype=torch.float64))

    @pytest.mark.parametrize("estimator", [k1, k3])
    def test_its_expectation_is_the_exact_kl(self, estimator):
        assert mean_and_variance(estimator)[0] == pytest.approx(exact_kl(LOGPROBS, REF_LOGPROBS).item())

    def test_k2_is_biased_but_agrees_with_kl_to_second_order(self):
        kl = exact_kl(LOGPROBS, REF_LOGPROBS).item()
        assert mean_and_variance(k2)[0] != pytest.approx(kl, rel=0.01)
        near = torch.log_softmax(LOGITS + 1e-3 * torch.arange(8), dim=0)
        kl = exact_kl(near, LOGPROBS).item()
        assert mean_and_variance(k2, near, LOGPROBS)[0] == pytest.approx(kl, rel=0.01)

    def test_k3_has_far_less_variance_than_k1_near_the_reference_and_more_far_from_it(self):
        near = torch.log_softmax(LOGITS + 0.1 * randn_like_logits(), dim=0)
        assert mean_and_variance(k3, near, LOGPROBS)[1] < 0.05 * mean_and_variance(k1, near, LOGPROBS)[1]
        assert mean_and_variance(k3)[1] > mean_and_variance(k1)[1]

    @pytest.mark.parametrize(
        ("estimator", "mean", "variance"),
        # π = (½, ½), π_ref = (¼, ¾): log-ratios 0.693147 and -0.405465, KL 0.143841, r = ½ and 3/2.
        # Two values a, b of equal probability have the mean (a + b)/2 and the variance ((a - b)/2)².
        [
            (k1, 0.143841, 0.301737),  # 0.693147, -0.405465
            (k2, 0.161214, 0.006243),  # ½ 0.480453, ½ 0.164402
            (k3, 0.143841, 0.002431),  # ½ - 1 + 0.693147, 3/2 - 1 - 0.405465
        ],
    )
    def test_its_expectation_and_variance_by_hand(self, estimator, mean, variance):
        logprobs = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
        ref_logprobs = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
        assert mean_and_variance(estimator, logprobs, ref_logprobs) == pytest.approx((mean, variance), abs=1e-6)

    def test_k1_and_k2_have_the_variance_that_moments_of_the_log_ratio_give(self):
        moments = [(P * (LOGPROBS - REF_LOGPROBS) ** power).sum().item() for power in (1, 2, 4)]
        assert mean_and_variance(k1)[1] == pytest.approx(moments[1] - moments[0] ** 2)
        assert mean_and_variance(k2)[1] == pytest.approx(moments[2] / 4 - moments[1] ** 2 / 4)

    def test_only_k1_can_be_negative(self):
        assert k1(LOGPROBS, REF_LOGPROBS).min() < 0
        assert k2(LOGPROBS, REF_LOGPROBS).min() >= 0 and k3(LOGPROBS, REF_LOGPROBS).min() >= 0

    def test_hand_worked_numbers(self):
        # π = 0.5, π_ref = 0.25: k1 = log 2 = 0.693147; k2 = ½ 0.480453 = 0.240227; k3 = 0.5 - 1 + 0.693147 = 0.193147
        logprobs, ref_logprobs = torch.tensor(0.5).log(), torch.tensor(0.25).log()
        actual = [estimator(logprobs, ref_logprobs).item() for estimator in (k1, k2, k3)]
        assert actual == pytest.approx([0.693147, 0.240227, 0.193147], abs=1e-6)

    @pytest.mark.parametrize("estimator", [k1, k2, k3])
    @pytest.mark.parametrize("logratio", [-100.0, 100.0])
    def test_value_and_gradient_are_finite_at_log_ratios_of_100(self, estimator, logratio):
        logprobs = torch.tensor([logratio], requires_grad=True)
        value = estimator(logprobs, torch.zeros(1))
        value.sum().backward()
        assert value.isfinite().all() and logprobs.grad.isfinite().all()

    def test_k3_pulls_back_a_token_that_the_reference_gives_up(self):
        logprobs = torch.tensor([0.0], requires_grad=True)
        k3(logprobs, torch.tensor([-100.0])).sum().backward()
        assert logprobs.grad.item() == 1.0

    def test_the_clamp_leaves_log_ratios_up_to_20_alone(self):
        ratios = torch.tensor([-30.0, -20.0, 0.5, 20.0, 30.0])
        assert clamped_logratio(ratios, torch.zeros(5)).tolist() == [-20.0, -20.0, 0.5, 20.0, 20.0]


class TestGradients:
    """What each estimator does as a loss, from tokens sampled from the present policy."""

    def test_k1_teaches_nothing(self):
        assert torch.allclose(mean_gradient(k1), torch.zeros(8, dtype=torch.float64), atol=1e-12)

    def test_k2_has_the_gradient_of_the_kl(self):
        assert torch.allclose(mean_gradient(k2), exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS)))

    def test_k3_has_the_gradient_of_the_opposite_kl(self):
        opposite = exact_gradient(lambda logprobs: exact_kl(REF_LOGPROBS, logprobs))
        assert torch.allclose(mean_gradient(k3), opposite)
        assert not torch.allclose(mean_gradient(k3), mean_gradient(k2))

    def test_k3_with_k2_gradient_has_the_value_of_one_and_the_gradient_of_the_other(self):
        def estimate(logprobs, ref_logprobs):
            return with_k2_gradient(k3(logprobs, ref_logprobs), logprobs, ref_logprobs)

        assert torch.allclose(estimate(LOGPROBS, REF_LOGPROBS), k3(LOGPROBS, REF_LOGPROBS))
        assert torch.allclose(mean_gradient(estimate), mean_gradient(k2))

    def test_k1_in_the_reward_has_the_gradient_of_the_kl(self):
        # The score-function estimator: E_π[k1 ∇log π], k1 as a reward without gradient.
        gradient = mean_gradient(lambda logprobs, ref: k1(logprobs, ref).detach() * logprobs)
        assert torch.allclose(gradient, exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS)))


class TestPenalty:
    """In the loss, also from tokens of an older policy: expectations are over π_old, here another categorical."""

    OLD_LOGPROBS = torch.log_softmax(LOGITS + randn_like_logits(), dim=0)

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    def test_in_the_loss_every_estimator_has_the_gradient_of_the_kl(self, estimator):
        logits = LOGITS.clone().requires_grad_()
        losses = KLPenalty("loss", estimator).loss(torch.log_softmax(logits, dim=0), self.OLD_LOGPROBS, REF_LOGPROBS)
        (gradient,) = torch.autograd.grad((self.OLD_LOGPROBS.exp() * losses).sum(), logits)
        assert torch.allclose(gradient, exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS)))

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_in_the_loss_the_value_is_the_exact_kl(self, estimator):
        losses = KLPenalty("loss", estimator).loss(LOGPROBS, self.OLD_LOGPROBS, REF_LOGPROBS)
        kl = (self.OLD_LOGPROBS.exp() * losses).sum().item()
        assert kl == pytest.approx(exact_kl(LOGPROBS, REF_LOGPROBS).item())

    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    def test_in_the_reward_k1_alone_has_the_gradient_of_the_kl(self, estimator):
        estimate = KLPenalty("reward", estimator).estimate
        gradient = mean_gradient(lambda logprobs, ref: estimate(logprobs, ref).detach() * logprobs)
        exact = exact_gradient(lambda logprobs: exact_kl(logprobs, REF_LOGPROBS))
        assert torch.allclose(gradient, exact) == (estimator == "k1")

    @pytest.mark.parametrize("logratio", [-100.0, 100.0])
    @pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
    def test_value_and_gradient_are_finite_at_log_ratios_of_100(self, estimator, logratio):
        logprobs = torch.tensor([logratio], requires_grad=True)
        for other in (torch.zeros(1), torch.tensor([logratio])):
            loss = KLPenalty("loss", estimator).loss(logprobs, other, torch.zeros(1))
            loss.sum().backward()
            assert loss.isfinite().all() and logprobs.grad.isfinite().all()

    @pytest.mark.parametrize("wrong", [{"place": "advantage"}, {"estimator": "k4"}])
    def test_other_words_are_refused_by_name(self, wrong):
        with pytest.raises(UserError, match=next(iter(wrong.values()))):
            KLPenalty(**wrong)


class TestControllers:
    def test_fixed_coefficient_stays(self):
        controller = FixedKL(0.3)
        controller.update(kl=100.0, num_episodes=64)
        assert controller.kl_coef == 0.3

    def test_adaptive_hand_worked_numbers(self):
        controller = AdaptiveKL(init_kl_coef=0.1, target=5.0, horizon=1000)
        controller.update(kl=5.5, num_episodes=100)  # error 0.1, factor 1 + 0.1 * 0.1 = 1.01
        assert controller.kl_coef == pytest.approx(0.101)
        controller.update(kl=50.0, num_episodes=100)  # error 9, clipped to 0.2, factor 1.02
        assert controller.kl_coef == pytest.approx(0.10302)
        controller.update(kl=0.0, num_episodes=100)  # error -1, clipped to -0.2, factor 0.98
        assert controller.kl_coef == pytest.approx(0.1009596)

    def test_adaptive_coefficient_stays_at_the_target(self):
        controller = AdaptiveKL(init_kl_coef=0.1, target=5.0)
        controller.update(kl=5.0, num_episodes=1000)
        assert controller.kl_coef == pytest.approx(0.1)

    def test_adaptive_controller_steers_kl_to_its_target(self):
        controller = AdaptiveKL(init_kl_coef=1.0, target=2.0, horizon=200)
        for _ in range(200):
            controller.update(kl=1 / controller.kl_coef, num_episodes=64)  # a policy whose KL falls as 1/β
        assert 1 / controller.kl_coef == pytest.approx(2.0, rel=1e-3)

    def test_a_rollout_of_many_horizons_halves_or_doubles_the_adaptive_coefficient(self):
        controller = AdaptiveKL(init_kl_coef=0.1, target=5.0, horizon=10)
        controller.update(kl=0.0, num_episodes=1000)
        assert controller.kl_coef == pytest.approx(0.05)
        controller.update(kl=100.0, num_episodes=1000)
        assert controller.kl_coef == pytest.approx(0.1)

    def test_a_resumed_controller_goes_on_where_it_stopped(self):
        first, second = AdaptiveKL(0.1), AdaptiveKL(0.7)
        first.update(kl=20.0, num_episodes=512)
        second.load_state_dict(first.state_dict())
        for controller in (first, second):
            controller.update(kl=3.0, num_episodes=512)
        assert second.kl_coef == first.kl_coef != 0.1

    def test_a_fixed_coefficient_is_the_configs_also_after_a_resume(self):
        controller = FixedKL(0.3)
        controller.load_state_dict(FixedKL(0.1).state_dict())
        assert controller.kl_coef == 0.3

    @pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
    def test_a_target_of_zero_or_less_is_refused_by_name(self, target):
        with pytest.raises(UserError, match=r"target \("):
            AdaptiveKL(target=target)

    @pytest.mark.parametrize("kl_coef", [0.0, -0.1, math.nan, math.inf])
    def test_an_initial_coefficient_that_could_never_grow_is_refused_by_name(self, kl_coef):
        with pytest.raises(UserError, match="init_kl_coef"):
            AdaptiveKL(init_kl_coef=kl_coef)

    @pytest.mark.parametrize("horizon", [0, math.inf])
    def test_a_horizon_of_zero_or_without_end_is_refused_by_name(self, horizon):
        with pytest.raises(UserError, match=r"horizon \("):
            AdaptiveKL(horizon=horizon)

    @pytest.mark.parametrize("kl_coef", [-0.1, math.nan, math.inf])
    def test_a_fixed_coefficient_that_is_negative_or_no_number_is_refused_by_name(self, kl_coef):
        with pytest.raises(UserError, match="kl_coef"):
            FixedKL(kl_coef)

    def test_nan_kl_does_not_enter_the_coefficient(self):
        controller = AdaptiveKL(init_kl_coef=0.1)
        with pytest.raises(ValueError, match="kl is NaN"):
            controller.update(kl=math.nan, num_episodes=64)
        assert controller.kl_coef == 0.1
