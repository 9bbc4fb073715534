import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lit_rlhf import PPO, FixedKL, RolloutDataModule, TextReward, UserError
from lit_rlhf.data.rollouts import RolloutLoader
from tests.tiny import EOS, save_tiny

PROMPTS = "\n".join(f'{{"prompt": "w{3 + i} w{5 + i % 7} w{4 + i % 3}"}}' for i in range(16))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("ppo") / "model")


def count_w9(prompts, responses, **columns):
    """The toy reward: the share of w9 in the response."""
    return [response.split().count("w9") / max(len(response.split()), 1) for response in responses]


def make(folder, tmp_path, reward=count_w9, trainer=None, data=None, **options):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS + "\n")
    module = PPO(str(folder), lr_scheduler="constant", **({"learning_rate": 1e-3} | options))
    sizes = {"rollout_size": 16, "num_slots": 4, "max_new_tokens": 8, "validation": None}
    datamodule = RolloutDataModule(
        TextReward(reward),
        train=str(tmp_path / "prompts.jsonl"),
        tokenizer=module.tokenizer,
        **(sizes | (data or {})),
    )
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
    }
    settings = quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": tmp_path} | (trainer or {})
    return module, datamodule, Trainer(**settings)


class Recorder(PPO):
    """PPO that keeps what it is trained on."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            logprobs, _ = self.policy(batch.packed, self.temperature)
        self.seen.append((batch, logprobs))
        return super().training_step(batch, batch_idx)


def record(folder, tmp_path, **options):
    module, data, trainer = make(folder, tmp_path, **options)
    module.__class__ = Recorder
    module.seen = []
    trainer.fit(module, data)
    return module


def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(folder, tmp_path):
    module = record(folder, tmp_path, temperature=0.7)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    for batch, _ in module.seen:
        assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    assert module.rollout_metrics["rollout/kl"] == 0.0


def test_advantages_are_whitened_over_the_whole_rollout_not_over_minibatches(folder, tmp_path):
    module = record(folder, tmp_path, ppo_epochs=1, num_minibatches=4)
    advantages = torch.cat([batch.advantages for batch, _ in module.seen])
    assert advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert advantages.var(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    assert any(abs(batch.advantages.mean().item()) > 0.01 for batch, _ in module.seen)


def test_each_pass_is_a_fresh_permutation_of_all_episodes(folder, tmp_path):
    module = record(folder, tmp_path, ppo_epochs=2, num_minibatches=2, trainer={"accumulate_grad_batches": 2})
    sizes = [batch.packed.num_sequences for batch, _ in module.seen]
    assert sizes == [4] * 8
    first, second = (torch.cat([batch.packed.target_ids for batch, _ in module.seen[i : i + 4]]) for i in (0, 4))
    assert sorted(first.tolist()) == sorted(second.tolist())
    assert first.tolist() != second.tolist()


def test_denominators_add_up_to_the_tokens_of_each_optimiser_step(folder, tmp_path):
    module = record(folder, tmp_path, ppo_epochs=1, num_minibatches=2, trainer={"accumulate_grad_batches": 2})
    for i in (0, 2):
        step = [batch for batch, _ in module.seen[i : i + 2]]
        tokens = sum(len(batch.packed.target_ids) for batch in step)
        assert {batch.denominator.item() for batch in step} == {tokens / 2}


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


def test_the_missing_end_penalty_hits_exactly_the_responses_that_no_stop_token_ended(folder, tmp_path):
    module = record(
        folder,
        tmp_path,
        reward=lambda p, r, **c: np.zeros(len(r)),
        kl=FixedKL(0.0),
        gae_lambda=1.0,
        missing_end_penalty=2.0,
        ppo_epochs=1,
    )
    ends = set()
    for batch, _ in module.seen:
        for sequence in range(batch.packed.num_sequences):
            tokens = batch.packed.sequence_ids == sequence
            stopped = batch.packed.target_ids[tokens][-1].item() == EOS
            ends.add(stopped)
            assert batch.returns[tokens][-1].item() == pytest.approx(0.0 if stopped else -2.0, abs=1e-5)
    assert ends == {True, False}


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


def test_validation_plays_held_out_prompts(folder, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    module, data, trainer = make(folder, tmp_path, data={"validation": str(tmp_path / "held_out.jsonl")})
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert metrics["val/kl"] == 0.0
    assert 0 <= metrics["val/score"] <= 1
    assert 1 <= metrics["val/response_length"] <= 8


def test_nan_rewards_stop_the_run_and_name_the_prompt(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, reward=lambda p, r, **c: [float("nan")] + [0.0] * (len(r) - 1))
    with pytest.raises(ValueError, match="not finite, by prompt index"):
        trainer.fit(module, data)


def test_monitors_are_logged_and_not_learnt_from(folder, tmp_path):
    monitors = {"length": TextReward(lambda p, r, **c: [float(len(x.split())) for x in r])}
    module, data, trainer = make(folder, tmp_path, data={"monitors": monitors})
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/length"] > 1
    assert 0 <= module.rollout_metrics["rollout/score"] <= 1


def test_a_rollout_that_cannot_be_cut_into_minibatches_is_refused_with_the_numbers(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, num_minibatches=20)
    with pytest.raises(UserError, match=r"rollout of 16 episodes .* num_minibatches \(20\)"):
        trainer.fit(module, data)


def test_the_loader_goes_on_in_mid_iteration_from_its_state(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path)
    trainer.fit(module, data)
    loader = RolloutLoader(data)
    whole = iter(loader)
    for _ in range(5):
        next(whole)
    state = loader.state_dict()
    other = RolloutLoader(data)
    other.load_state_dict(state)
    rest, expected = list(other), list(whole)
    assert len(rest) == len(expected) == 11
    for ours, theirs in zip(rest, expected, strict=True):
        assert torch.equal(ours.packed.target_ids, theirs.packed.target_ids)
        assert torch.equal(ours.advantages, theirs.advantages)
