import math

import pytest
import torch

from lit_rlhf.algorithms.kl_control import AdaptiveKL, FixedKL, KLPenalty
from lit_rlhf.errors import UserError
from tests.losses.test_kl import LOGITS, LOGPROBS, OTHER_LOGITS, REF_LOGPROBS, exact_gradient, exact_kl, mean_gradient


class TestPenalty:
    """In the loss, also from tokens of an older policy: expectations are over π_old, here another categorical."""

    OLD_LOGPROBS = torch.log_softmax(LOGITS + OTHER_LOGITS, dim=0)

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
