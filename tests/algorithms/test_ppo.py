"""PPO: its returns, its critic, its defaults, and whether it learns."""

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import PPO, AdaptiveKL, FixedKL, RewardModel, RewardShaping
from lit_rlhf.callbacks.export import export
from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.losses import value_loss
from tests.ppo_runs import Logged, fit, make, moved, record
from tests.tiny import EOS, random_examples, save_tiny


def test_gamma_and_lambda_one_without_kl_make_every_return_the_score(folder, tmp_path):
    module = record(
        folder,
        tmp_path,
        reward=lambda p, r, **c: np.arange(len(r)) + 1.0,
        kl=FixedKL(0.0),
        gae_lambda=1.0,
        ppo_epochs=1,
    )
    for batch, _ in module.seen:
        for sequence in range(batch.packed.num_sequences):
            returns = batch.returns[batch.packed.sequence_ids == sequence]
            torch.testing.assert_close(returns, returns[-1].expand_as(returns))
            assert returns[-1].item() == pytest.approx(round(returns[-1].item()), abs=1e-4)


def test_ppo_learns_to_write_the_rewarded_token(folder, tmp_path):
    module, data, trainer = make(
        folder,
        tmp_path,
        kl=FixedKL(0.0),
        learning_rate=3e-3,
        trainer={"max_epochs": 25},
        data={"rollout_size": 64, "num_slots": 32},
        ppo_epochs=2,
        num_minibatches=2,
    )
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/score"] > 0.8


def test_nan_rewards_stop_the_run_and_name_function_and_prompts(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, reward=lambda p, r, **c: [float("nan")] + [0.0] * (len(r) - 1))
    words = r"^data\.reward \(.*test_ppo\..*<lambda>\) returned .* not finite: nan \(.*prompts.jsonl, line \d+\)$"
    with pytest.raises(ValueError, match=words):
        trainer.fit(module, data)


def test_pad_equal_to_eos_changes_no_bit_of_training(tmp_path):
    ends = []
    for pad_is_eos in (False, True):
        torch.manual_seed(0)
        model = save_tiny(tmp_path / f"model-{pad_is_eos}", pad_is_eos=pad_is_eos)
        shaping = RewardShaping(missing_end_penalty=1.0)
        module, steps = fit(model, tmp_path, reward=lambda p, r, **c: [x.count("w9") for x in r], shaping=shaping)
        assert (module.tokenizer.pad_token_id == EOS) == pad_is_eos
        ends.append(steps.policy[-1])
    assert torch.equal(*ends)


def test_gradient_clipping_is_the_trainers(folder, tmp_path):
    _, free = fit(folder, tmp_path)
    _, clipped = fit(folder, tmp_path, trainer={"gradient_clip_val": 0.01})
    assert min(free.norms) > 0.02
    assert max(clipped.norms) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_holds_the_critic_and_a_failed_one_leaves_the_last(folder, tmp_path, monkeypatch):
    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1)  # keeps the newest alone
    module, data, trainer = make(
        folder, tmp_path, trainer={"callbacks": [saver], "enable_checkpointing": True, "max_steps": 2}
    )
    trainer.fit(module, data)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    content = torch.load(kept, weights_only=False)
    for name, weight in module.critic.state_dict().items():
        assert torch.equal(content["state_dict"][f"critic.{name}"], weight)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    saver = ModelCheckpoint(dirpath=tmp_path / "checkpoints", every_n_train_steps=1)
    module, data, trainer = make(
        folder, tmp_path, trainer={"callbacks": [saver], "enable_checkpointing": True, "max_steps": 4}
    )
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io._atomic_save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(module, data, ckpt_path=kept)
    assert list((tmp_path / "checkpoints").iterdir()) == [kept]
    assert torch.load(kept, weights_only=False)["global_step"] == 2


def test_dropout_is_off_in_every_role(tmp_path):
    module = PPO(str(save_tiny(tmp_path / "gpt2", "gpt2")))
    assert module.policy.model.config.resid_pdrop > 0
    packed = pack(random_examples(3))
    for network in (module.policy, module.frozen["reference"], module.critic):
        network.train()
        arguments = (packed, packed.last_nodes) if network is module.critic else (packed,)
        first, second = (network(*arguments) for _ in range(2))
        first, second = (x[0] if isinstance(x, tuple) else x for x in (first, second))
        assert torch.equal(first, second)


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


def test_adams_epsilon_is_1e_5_unless_said_otherwise(folder, tmp_path):
    module, _ = fit(folder, tmp_path)
    assert module.trainer.optimizers[0].defaults["eps"] == 1e-5
    module, _ = fit(folder, tmp_path, adam_eps=1e-8)
    assert module.trainer.optimizers[0].defaults["eps"] == 1e-8
