import math

import numpy as np
import pytest
import torch

from lit_rlhf.algorithms.kl_control import AdaptiveKL, FixedKL, KLPenalty
from lit_rlhf.errors import UserError
from lit_rlhf.losses.kl import k1, k2, k3
from tests.losses.test_kl import LOGITS, LOGPROBS, OTHER_LOGITS, REF_LOGPROBS, exact_gradient, exact_kl, mean_gradient
from tests.ppo_runs import Logged, Recorder, Rollouts, away_from_reference, constant, make


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


class TestKLPenalty:
    @pytest.mark.parametrize(("estimator", "function"), [("k1", k1), ("k2", k2), ("k3", k3)])
    def test_in_the_reward_the_first_return_is_minus_the_sum_of_the_estimates(
        self, folder, tmp_path, estimator, function
    ):
        module, data, trainer = make(
            folder,
            tmp_path,
            reward=constant,
            kl=FixedKL(0.5),
            kl_penalty=KLPenalty("reward", estimator),
            gae_lambda=1.0,
            ppo_epochs=1,
        )
        module.__class__, module.seen = Recorder, []
        away_from_reference(module)
        trainer.fit(module, data)
        for batch, _ in module.seen:
            sums = batch.packed.sum_by_sequence(function(batch.old_logprobs, batch.ref_logprobs))
            first = torch.searchsorted(batch.packed.sequence_ids, torch.arange(batch.packed.num_sequences))
            torch.testing.assert_close(batch.returns[first], -0.5 * sums)

    def test_in_the_loss_it_leaves_the_rewards_alone(self, folder, tmp_path):
        options = {"kl": FixedKL(0.5), "kl_penalty": KLPenalty("loss"), "gae_lambda": 1.0, "ppo_epochs": 1}
        module, data, trainer = make(folder, tmp_path, reward=constant, **options)
        module.__class__, module.seen = Recorder, []
        away_from_reference(module)
        trainer.fit(module, data)
        assert module.rollout_metrics["rollout/kl"] > 1
        assert max(batch.returns.abs().max().item() for batch, _ in module.seen) < 1e-5

    def test_in_the_loss_it_weighs_what_the_rollout_logs_while_the_controller_adapts(self, folder, tmp_path):
        names = ("train/loss", "ppo/policy_loss", "ppo/kl_loss")
        watches, rollouts = [Logged(name) for name in names], Rollouts()
        module, data, trainer = make(
            folder,
            tmp_path,
            kl=AdaptiveKL(0.1, target=0.01, horizon=16),
            kl_penalty=KLPenalty("loss", "k3"),
            value_coef=0.0,
            ppo_epochs=1,
            num_minibatches=1,
            trainer={"max_epochs": 3, "callbacks": [*watches, rollouts]},
        )
        away_from_reference(module)
        trainer.fit(module, data)
        losses, policy_losses, kl_losses = (watch.values for watch in watches)
        used = [(a - b) / c for a, b, c in zip(losses, policy_losses, kl_losses, strict=True)]
        assert used == pytest.approx([0.1, 0.12, 0.144], rel=1e-4)
        assert used == pytest.approx([metrics["rollout/kl_coef"] for metrics in rollouts.metrics], rel=1e-4)

    @pytest.mark.parametrize("place", ["reward", "loss"])
    def test_it_draws_the_policy_to_the_reference(self, folder, tmp_path, place):
        module, data, trainer = make(
            folder,
            tmp_path,
            reward=constant,
            kl=FixedKL(1.0),
            kl_penalty=KLPenalty(place, "k1" if place == "reward" else "k3"),
            gae_lambda=1.0,
            learning_rate=3e-3,
            num_minibatches=2,
            trainer={"max_epochs": 8, "callbacks": [watch := Rollouts()]},
            data={"rollout_size": 32, "num_slots": 32},
        )
        away_from_reference(module)
        trainer.fit(module, data)
        kl = [metrics["rollout/kl"] for metrics in watch.metrics]
        assert np.mean(kl[-3:]) < 0.75 * kl[0]  # without the penalty, as much as at first
