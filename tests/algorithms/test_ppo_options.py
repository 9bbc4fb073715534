"""What the options of PPO do to a run."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import PPO, AdaptiveKL, FixedKL, KLPenalty, RewardModel, RewardShaping, UserError
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.losses import value_loss
from lit_rlhf.losses.kl import k1, k2, k3
from tests.ppo_runs import (
    PROMPTS,
    Logged,
    Recorder,
    Rollouts,
    Steps,
    away_from_reference,
    constant,
    fit,
    make,
    moved,
    record,
)
from tests.tiny import random_examples, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("ppo") / "model")


class TestTargetKL:
    def test_a_stop_leaves_the_rest_of_the_iteration_untaken_and_the_next_one_learns_again(self, folder, tmp_path):
        _, steps = fit(folder, tmp_path, target_kl=1e-6, ppo_epochs=2, num_minibatches=2, trainer={"max_epochs": 2})
        # The first step of an iteration shows no KL; after it the policy has left its rollout.
        assert steps.stopped == [False, True, True, True] * 2
        assert moved(steps.policy) == moved(steps.critic) == [True, False, False, False] * 2
        assert steps.episodes == [8, 8, 1, 1] * 2  # what is left is gone through for form's sake, not computed

    def test_steps_schedule_and_validation_are_as_planned(self, folder, tmp_path):
        (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
        runs = {}
        for target in (1e-6, None):
            module, steps = fit(
                folder,
                tmp_path,
                target_kl=target,
                ppo_epochs=2,
                num_minibatches=2,
                lr_scheduler="linear",
                data={"validation": str(tmp_path / "held_out.jsonl")},
                trainer={"max_epochs": 2, "accumulate_grad_batches": 2},
            )
            assert "val/score" in module.trainer.callback_metrics
            runs[target] = (module.trainer.global_step, steps.rates)
        assert runs[1e-6] == runs[None]
        assert runs[None][0] == 8 and runs[None][1][-1] == 0

    def test_a_target_out_of_reach_changes_nothing(self, folder, tmp_path):
        ends = []
        for target in (1e6, None):
            torch.manual_seed(0)
            ends.append(fit(folder, tmp_path, target_kl=target)[1].policy[-1])
        assert torch.equal(*ends)

    def test_the_kl_is_the_mean_over_the_tokens_of_the_whole_step(self, folder, tmp_path):
        class Watch(PPO):
            def on_before_optimizer_step(self, optimizer):
                self.seen_kl.append(torch.stack(self.step_kl).mean().item())
                super().on_before_optimizer_step(optimizer)

        kls = {}
        for accumulate in (1, 4):
            torch.manual_seed(0)
            module, data, trainer = make(
                folder, tmp_path, ppo_epochs=3, num_minibatches=1, trainer={"accumulate_grad_batches": accumulate}
            )
            module.__class__, module.seen_kl = Watch, []
            trainer.fit(module, data)
            kls[accumulate] = module.seen_kl
        assert kls[1][0] == 0 < kls[1][1] < kls[1][2]
        assert kls[4] == pytest.approx(kls[1], rel=1e-3, abs=1e-6)

    def test_a_stop_is_decided_by_the_whole_step_not_by_its_last_part(self, folder, tmp_path):
        class Watch(PPO):
            def on_before_optimizer_step(self, optimizer):
                kls = torch.stack(self.step_kl)
                target_kl = max(
                    (kls.mean() + kls[-1]).item() / 2, 1e-12
                )  # the last part alone would decide the other way
                self.updates = replace(self.updates, target_kl=target_kl)
                super().on_before_optimizer_step(optimizer)
                self.decisions.append(self.stopped)
                self.expected.append(kls.mean().item() > target_kl)
                self.stopped = False

        module, data, trainer = make(
            folder, tmp_path, target_kl=1.0, ppo_epochs=4, num_minibatches=1, trainer={"accumulate_grad_batches": 4}
        )
        module.__class__, module.decisions, module.expected = Watch, [], []
        trainer.fit(module, data)
        assert module.decisions == module.expected

    @pytest.mark.filterwarnings("ignore:The dirpath has changed")
    def test_a_stop_outlives_a_resume(self, folder, tmp_path):
        steps = Steps()
        for target, callbacks, max_epochs in ((1e-6, [], 1), (1e6, [steps], 2)):
            saver = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
            settings = {"callbacks": [*callbacks, saver], "enable_checkpointing": True, "max_epochs": max_epochs}
            module, data, trainer = make(
                folder, tmp_path, target_kl=target, ppo_epochs=2, num_minibatches=2, trainer=settings
            )
            trainer.fit(module, data, ckpt_path=tmp_path / "step=2.ckpt" if callbacks else None)
        assert moved(steps.policy) == [False, False, True, True, True, True]

    def test_a_target_of_zero_is_refused(self, folder):
        with pytest.raises(UserError, match=r"target_kl \(0.0\) must be more than 0"):
            PPO(str(folder), target_kl=0.0)


class TestCritic:
    def test_while_it_warms_up_the_policy_stands_still_under_weight_decay_and_kl_control_too(self, folder, tmp_path):
        kl = AdaptiveKL(0.1, target=1.0, horizon=16)
        _, steps = fit(
            folder,
            tmp_path,
            critic_warmup=1,
            kl=kl,
            weight_decay=0.1,
            ppo_epochs=1,
            num_minibatches=2,
            trainer={"max_epochs": 2},
        )
        assert moved(steps.policy) == [False, False, True, True]
        assert moved(steps.critic) == [True] * 4
        assert kl.kl_coef == pytest.approx(0.1 * 0.8)  # adapted once, after the second rollout, which still had no KL

    def test_its_loss_is_clipped_around_the_values_of_the_rollout_and_counts_by_its_coefficient(self, folder, tmp_path):
        class Watch(PPO):
            def training_step(self, batch, batch_idx):
                values = self.critic(batch.packed, batch.packed.predictors).detach()
                self.clipped.append(value_loss(values, batch.old_values, batch.returns, 0.01).mean().item())
                self.free.append(value_loss(values, batch.old_values, batch.returns, None).mean().item())
                return super().training_step(batch, batch_idx)

        names = ("train/loss", "ppo/policy_loss", "ppo/value_loss")
        for coefficient in (0.3, 0.0):
            watches = [Logged(name) for name in names]
            module, data, trainer = make(
                folder,
                tmp_path,
                value_coef=coefficient,
                value_clip_range=0.01,
                critic_learning_rate=1e-2,
                ppo_epochs=2,
                num_minibatches=1,
                trainer={"max_epochs": 2, "callbacks": watches},
            )
            module.__class__, module.clipped, module.free = Watch, [], []
            trainer.fit(module, data)
            losses, policy_losses, value_losses = (watch.values for watch in watches)
            assert value_losses == pytest.approx(module.clipped, rel=1e-4)
            expected = [policy + coefficient * value for policy, value in zip(policy_losses, value_losses, strict=True)]
            assert losses == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert value_losses == pytest.approx(module.free, rel=1e-4)  # without weight, the critic stands still

    def test_its_learning_rate_is_its_own(self, folder, tmp_path):
        _, steps = fit(folder, tmp_path, critic_learning_rate=0.0)
        assert all(moved(steps.policy)) and not any(moved(steps.critic))
        _, steps = fit(folder, tmp_path, learning_rate=0.0, critic_learning_rate=1e-3)
        assert not any(moved(steps.policy)) and all(moved(steps.critic))

    def test_it_starts_as_the_reward_model_shift_included(self, folder, tmp_path):
        reward_model = RewardModel(str(folder))
        reward_model.reward_model.model.config.score_bias = 0.7
        export(reward_model, full_state_dict(reward_model.exportable()), tmp_path / "rm")
        module = PPO(str(folder), critic=str(tmp_path / "rm"))
        packed = pack(random_examples(3))
        with torch.no_grad():
            values, scores = (
                network(packed, packed.last_nodes) for network in (module.critic, reward_model.reward_model)
            )
        torch.testing.assert_close(values, scores)

    def test_it_learns_to_foresee_returns(self, folder, tmp_path):
        module, data, trainer = make(
            folder,
            tmp_path,
            reward=lambda p, r, **c: [float(x.split()[0] in ("w3", "w5", "w7", "w9", "w11", "w13")) for x in p],
            kl=FixedKL(0.0),
            learning_rate=0.0,
            critic_learning_rate=5e-3,
            value_clip_range=None,
            trainer={"max_epochs": 10},
            data={"rollout_size": 32, "num_slots": 32},
            num_minibatches=2,
        )
        trainer.fit(module, data)
        assert module.rollout_metrics["ppo/explained_variance"] > 0.8


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


def test_the_entropy_bonus_raises_entropy(folder, tmp_path):
    entropies = {}
    for coefficient in (0.0, 0.3):
        watch = Logged("ppo/entropy")
        module, data, trainer = make(
            folder,
            tmp_path,
            reward=constant,
            kl=FixedKL(0.0),
            temperature=0.3,
            entropy_coef=coefficient,
            ppo_epochs=2,
            num_minibatches=2,
            trainer={"max_epochs": 4, "callbacks": [watch]},
        )
        trainer.fit(module, data)
        entropies[coefficient] = watch.values
    assert entropies[0.0] == []  # not computed where nothing asks for it
    assert np.mean(entropies[0.3][-4:]) > np.mean(entropies[0.3][:4]) + 0.2


def test_whitened_token_rewards_have_variance_1_over_the_rollout_and_keep_their_mean(folder, tmp_path):
    module = record(
        folder,
        tmp_path,
        reward=lambda p, r, **c: [50.0] * len(r),
        kl=FixedKL(0.0),
        shaping=RewardShaping(whiten=True),
        gamma=0.0,  # each token's return is its own reward
        ppo_epochs=1,
    )
    returns = torch.cat([batch.returns for batch, _ in module.seen])
    assert returns.var(correction=0).item() == pytest.approx(1, abs=1e-4)
    assert returns.mean().item() == pytest.approx(50.0 * 16 / len(returns), rel=1e-4)


def test_shaping_changes_what_is_learnt_and_not_the_score_that_is_logged(folder, tmp_path):
    module, _ = fit(
        folder,
        tmp_path,
        reward=lambda p, r, **c: [5.0] * len(r),
        shaping=RewardShaping(clip=2.0, missing_end_score=-1.0),
        ppo_epochs=1,
    )
    metrics = module.rollout_metrics
    assert metrics["rollout/score"] == 5.0
    stopped = metrics["rollout/eos_fraction"]
    assert 0 < stopped < 1
    assert metrics["rollout/shaped_score"] == pytest.approx(2.0 * stopped - 1.0 * (1 - stopped))


def test_adams_epsilon_is_1e_5_unless_said_otherwise(folder, tmp_path):
    module, _ = fit(folder, tmp_path)
    assert module.trainer.optimizers[0].defaults["eps"] == 1e-5
    module, _ = fit(folder, tmp_path, adam_eps=1e-8)
    assert module.trainer.optimizers[0].defaults["eps"] == 1e-8
