import collections
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lit_rlhf import PPO, FixedKL, KLPenalty, RewardShaping, TextReward, UserError
from lit_rlhf.callbacks import SampleTable
from lit_rlhf.engine.packing import pack
from lit_rlhf.rollout.data_module import RolloutLoader
from tests.ppo_runs import PROMPTS, Logged, away_from_reference, constant, count_w9, fit, make, record
from tests.tiny import EOS, random_examples, save_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("ppo") / "model")


def test_the_first_ratio_is_exactly_one_and_the_first_kl_exactly_zero(folder, tmp_path):
    module = record(folder, tmp_path, temperature=0.7)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    for batch, _ in module.seen:
        assert torch.equal(batch.old_logprobs, batch.ref_logprobs)
    assert module.rollout_metrics["rollout/kl"] == 0.0


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


def test_nan_rewards_stop_the_run_and_name_function_and_prompts(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, reward=lambda p, r, **c: [float("nan")] + [0.0] * (len(r) - 1))
    words = r"test_ppo.*<lambda> .*one finite number per response; 1 of 16 are not: nan for the prompt 'w\d+ w\d+ w\d+'"
    with pytest.raises(ValueError, match=words):
        trainer.fit(module, data)


def test_monitors_are_logged_and_not_learnt_from(folder, tmp_path):
    monitors = {"length": TextReward(lambda p, r, **c: [float(len(x.split())) for x in r])}
    module, data, trainer = make(folder, tmp_path, data={"monitors": monitors})
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/length"] > 1
    assert 0 <= module.rollout_metrics["rollout/score"] <= 1


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"limit_train_batches": 1}, r"limit_train_batches \(1\) would end an iteration"),
        ({"limit_train_batches": 0.5}, r"limit_train_batches \(0.5\) would end an iteration"),
        ({"overfit_batches": 1}, r"overfit_batches \(1\)"),
        ({"callbacks": [GradientAccumulationScheduler({0: 1, 1: 2})]}, "GradientAccumulationScheduler"),
    ],
    ids=["limit", "share", "overfit", "accumulation"],
)
def test_options_of_the_trainer_that_would_cut_or_mix_up_rollouts_are_refused(folder, tmp_path, option, words):
    module, data, trainer = make(folder, tmp_path, trainer={"max_epochs": 4} | option)
    with pytest.raises(UserError, match=words):
        trainer.fit(module, data)


def test_a_fast_dev_run_plays_one_rollout(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, trainer={"fast_dev_run": True})
    trainer.fit(module, data)
    assert trainer.global_step == 1


def test_the_demos_held_out_prompts_are_not_taken_for_those_of_other_training_prompts(folder, tmp_path):
    with pytest.raises(UserError, match=r"data.validation is still 'demo' while data.train is '.*prompts\.jsonl'"):
        make(folder, tmp_path, data={"validation": "demo"})


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_ratio_is_exactly_one_in_every_precision(folder, tmp_path, precision):
    watch = Logged("ppo/ratio")
    module, data, trainer = make(
        folder, tmp_path, num_minibatches=1, ppo_epochs=2, trainer={"precision": precision, "callbacks": [watch]}
    )
    trainer.fit(module, data)
    assert watch.values[0] == 1.0 != watch.values[1]


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


def test_the_gradient_of_a_step_does_not_depend_on_its_split_into_micro_batches(folder, tmp_path):
    class Gradients(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.taken = torch.cat([p.grad.flatten() for p in pl_module.parameters()])

    gradients = []
    for accumulate in (1, 5):
        torch.manual_seed(0)
        module, data, trainer = make(
            folder,
            tmp_path,
            ppo_epochs=1,
            num_minibatches=1,
            entropy_coef=0.1,
            kl_penalty=KLPenalty("loss", "k3"),
            trainer={"accumulate_grad_batches": accumulate, "callbacks": [watch := Gradients()]},
        )
        away_from_reference(module)
        trainer.fit(module, data)
        gradients.append(watch.taken)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_gradient_clipping_is_the_trainers(folder, tmp_path):
    _, free = fit(folder, tmp_path)
    _, clipped = fit(folder, tmp_path, trainer={"gradient_clip_val": 0.01})
    assert min(free.norms) > 0.02
    assert max(clipped.norms) == pytest.approx(0.01, rel=1e-3)


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


def test_sample_tables_show_completions_with_their_scores(folder, tmp_path):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    module, data, trainer = make(folder, tmp_path, data={"validation": str(tmp_path / "held_out.jsonl")})
    trainer.validate(module, data, verbose=False)
    rows = module.sample_table(data.sample_prompts(3))
    assert len(rows) == 3
    for row in rows:
        assert set(row) == {"prompt", "completion", "finish_reason", "score"}
        assert row["score"] == pytest.approx(count_w9([], [row["completion"]])[0])


def test_samples_are_logged_at_each_validation(folder, tmp_path, monkeypatch):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    logger = TensorBoardLogger(tmp_path)
    tables = []
    monkeypatch.setattr(logger.experiment, "add_text", lambda tag, text, step: tables.append((tag, text, step)))
    module, data, trainer = make(
        folder,
        tmp_path,
        num_minibatches=1,
        ppo_epochs=1,
        data={"validation": str(tmp_path / "held_out.jsonl")},
        trainer={"max_epochs": 2, "logger": logger, "callbacks": [SampleTable(num_prompts=3)]},
    )
    trainer.fit(module, data)
    assert [(tag, step) for tag, _, step in tables] == [("samples", 1), ("samples", 2)]
    assert all(text.startswith("| prompt | completion |") and text.count("\n") == 4 for _, text, _ in tables)


def test_a_gradient_that_is_not_finite_stops_the_run_with_the_weights_as_they_were(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path)
    before = module.policy.head.weight.clone()
    module.policy.head.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(UserError, match="no step was taken"):
        trainer.fit(module, data)
    assert torch.equal(module.policy.head.weight, before)


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
