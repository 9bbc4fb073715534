"""The on-policy road: what is played, scored, charged and learnt, by PPO as its example."""

import collections
import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lit_rlhf import PPO, FixedKL, KLPenalty, RewardShaping, TextReward, UserError
from lit_rlhf.rollout.loader import RolloutLoader
from tests.ppo_runs import PROMPTS, Logged, Steps, away_from_reference, constant, count_w9, fit, make, moved, record
from tests.tiny import EOS


def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(folder, tmp_path):
    module = record(folder, tmp_path, temperature=0.7)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    for batch, _ in module.seen:
        assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    assert module.rollout_metrics["rollout/kl"] == 0.0


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_ratio_is_exactly_one_in_every_precision(folder, tmp_path, precision):
    watch = Logged("ppo/ratio")
    module, data, trainer = make(
        folder, tmp_path, num_minibatches=1, ppo_epochs=2, trainer={"precision": precision, "callbacks": [watch]}
    )
    trainer.fit(module, data)
    assert watch.values[0] == 1.0 != watch.values[1]


def test_each_role_reads_each_response_no_more_often_than_it_must(folder, tmp_path, monkeypatch):
    """Once to score a rollout; policy and critic once more in each pass. The sampler's own steps are no forward."""
    sequences = collections.Counter()

    def counted(network, name):
        forward = network.forward

        def count(batch, *args, **kwargs):
            sequences[name] += batch.num_sequences
            return forward(batch, *args, **kwargs)

        monkeypatch.setattr(network, "forward", count)

    module, data, trainer = make(folder, tmp_path, ppo_epochs=3, num_minibatches=2)
    for name, network in (("policy", module.policy), ("critic", module.critic), *module.frozen.items()):
        counted(network, name)
    trainer.fit(module, data)
    assert sequences == {"policy": 16 * (1 + 3), "critic": 16 * (1 + 3), "reference": 16}


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


def test_the_missing_end_penalty_hits_exactly_the_responses_that_no_stop_token_ended(folder, tmp_path):
    module = record(
        folder,
        tmp_path,
        reward=lambda p, r, **c: np.zeros(len(r)),
        kl=FixedKL(0.0),
        gae_lambda=1.0,
        shaping=RewardShaping(missing_end_penalty=2.0),
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


def test_validation_plays_held_out_prompts(folder, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    module, data, trainer = make(folder, tmp_path, data={"validation": str(tmp_path / "held_out.jsonl")})
    (metrics,) = trainer.validate(module, data, verbose=False)
    assert metrics["val/kl"] == 0.0
    assert 0 <= metrics["val/score"] <= 1
    assert 1 <= metrics["val/response_length"] <= 8


def test_monitors_are_logged_and_not_learnt_from(folder, tmp_path):
    monitors = {"length": TextReward(lambda p, r, **c: [float(len(x.split())) for x in r])}
    module, data, trainer = make(folder, tmp_path, data={"monitors": monitors})
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/length"] > 1
    assert 0 <= module.rollout_metrics["rollout/score"] <= 1


def test_every_iteration_logs_its_rollout(folder, tmp_path):
    logger = CSVLogger(tmp_path, name="logs", version="")
    module, data, trainer = make(folder, tmp_path, trainer={"max_epochs": 2, "logger": logger, "log_every_n_steps": 1})
    trainer.fit(module, data)
    with open(tmp_path / "logs" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/score"]]
    assert len(rows) == 2
    names = ("score", "shaped_score", "kl", "kl_coef", "response_length", "eos_fraction", "sampler_gap")
    for name in ("ppo/explained_variance", *(f"rollout/{name}" for name in names)):
        assert np.isfinite(float(rows[-1][name])), name
        assert float(rows[-1][name]) == pytest.approx(module.rollout_metrics[name], rel=1e-4, abs=1e-6)


def test_one_set_of_stop_tokens_ends_responses_and_spares_the_penalty(folder, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    stops = [EOS, *range(3, 20)]  # the configured stop tokens, not the end-of-sequence token alone
    (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": stops}))
    module = record(
        model,
        tmp_path,
        reward=constant,
        kl=FixedKL(0.0),
        gae_lambda=1.0,
        shaping=RewardShaping(missing_end_penalty=2.0),
        ppo_epochs=1,
    )
    ended_by = set()
    for batch, _ in module.seen:
        for sequence in range(batch.packed.num_sequences):
            tokens = batch.packed.sequence_ids == sequence
            last = batch.packed.target_ids[tokens][-1].item()
            ended_by.add(last)
            assert batch.returns[tokens][-1].item() == pytest.approx(0.0 if last in stops else -2.0, abs=1e-5)
    assert ended_by & set(range(3, 20))


def test_the_gradient_of_a_step_does_not_depend_on_its_split_into_micro_batches(folder, tmp_path):
    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.taken = torch.cat([p.grad.flatten() for p in pl_module.parameters()])

    gradients = []
    for accumulate, max_tokens in ((1, None), (5, None), (1, 40), (2, 24)):
        torch.manual_seed(0)
        module, data, trainer = make(
            folder,
            tmp_path,
            ppo_epochs=1,
            num_minibatches=1,
            entropy_coef=0.1,
            kl_penalty=KLPenalty("loss", "k3"),
            data={"max_tokens": max_tokens},
            trainer={"accumulate_grad_batches": accumulate, "callbacks": [watch := Gradients()]},
        )
        away_from_reference(module)
        trainer.fit(module, data)
        gradients.append(watch.taken)
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-4, atol=1e-6)


def test_sample_tables_show_completions_with_their_scores(folder, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    module, data, trainer = make(folder, tmp_path, data={"validation": str(tmp_path / "held_out.jsonl")})
    trainer.validate(module, data, verbose=False)
    samples = module.samples(data.sample_prompts(3))
    assert len(samples) == 3
    for row, *_ in samples:
        assert set(row) == {"prompt", "completion", "finish_reason", "score", "kl"}
        assert row["score"] == pytest.approx(count_w9([], [row["completion"]])[0])


def test_a_rollout_keeps_a_few_numbers_per_token_and_no_distribution(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path)
    trainer.fit(module, data)
    loader = RolloutLoader(data)
    next(iter(loader))
    experience = loader.experience
    tokens = sum(len(ids) for ids in experience.response_ids)
    assert {name: sum(map(len, rows)) for name, rows in experience.tokens.items()} == dict.fromkeys(
        ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns"), tokens
    )
    assert all(row.ndim == 1 for rows in experience.tokens.values() for row in rows)


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
