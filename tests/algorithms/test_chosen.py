"""A method is a policy loss and an advantage estimator, each a function that the YAML names by its import path."""

import json
import math
import re
from functools import partial

import pytest
import torch
import yaml

from lit_rlhf import PPO, UserError
from lit_rlhf.algorithms.chosen import ChosenFunction, chosen_estimator, chosen_loss
from lit_rlhf.cli.main import main
from lit_rlhf.losses import Advantages, PolicyLoss, PolicyTokens, gae, ppo_policy_loss
from tests.ppo_runs import PROMPTS, make, record


def reinforce_loss(tokens: PolicyTokens, scale: float = 1.0) -> PolicyLoss:
    """-A log π: no ratio, no clip."""
    return PolicyLoss(-scale * tokens.advantages * tokens.logprobs, {"scaled": torch.full_like(tokens.logprobs, scale)})


def above_the_prompt_mean(rollout):
    """Each response's score over the mean of its prompt's, on all of its tokens."""
    sums = torch.zeros(int(rollout.prompt_index.max()) + 1).index_add(0, rollout.prompt_index, rollout.scores)
    means = sums / rollout.prompt_index.bincount()
    rows = (rollout.scores - means[rollout.prompt_index])[:, None] * rollout.response_mask
    return Advantages(rows, rows)


@pytest.mark.filterwarnings("ignore")  # of LightningCLI run from within Python
def test_a_yaml_names_them_by_import_path_and_gives_options(folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(PROMPTS + "\n")
    config = {
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": str(tmp_path / "run")}
        | {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1},
        "model": {
            "class_path": "lit_rlhf.PPO",
            "init_args": {
                "policy": str(folder),
                "advantages": f"{__name__}.above_the_prompt_mean",
                "loss": {"function": f"{__name__}.reinforce_loss", "options": {"scale": 2.0}},
                "num_minibatches": 1,
            },
        },
        "data": {
            "class_path": "lit_rlhf.RolloutDataModule",
            "init_args": {
                "reward": {"class_path": "lit_rlhf.TextReward", "init_args": {"function": "tests.ppo_runs.count_w9"}},
                "train": str(tmp_path / "prompts.jsonl"),
                "validation": None,
                "rollout_size": 8,
                "num_slots": 4,
                "max_new_tokens": 4,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert metrics["ppo/scaled"] == 2.0


def test_the_estimator_sees_scores_and_prompts_and_what_it_gives_is_learnt_from(folder, tmp_path):
    seen = []

    def watched(rollout):
        seen.append(rollout)
        return above_the_prompt_mean(rollout)

    data = {"rollout_size": 32}  # of 16 prompts: each twice
    module = record(folder, tmp_path, advantages=watched, num_minibatches=1, ppo_epochs=1, data=data)
    rollout = seen[-1]
    assert rollout.prompt_index.bincount().tolist() == [2] * 16
    assert torch.equal(rollout.scores, torch.stack([row.sum() for row in rollout.token_rewards]))  # no KL yet
    (batch, _), *_ = module.seen
    assert torch.equal(batch.returns, above_the_prompt_mean(rollout).returns[rollout.response_mask])


def test_the_loss_of_a_step_is_the_chosen_one(folder, tmp_path):
    class Watch(PPO):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                logprobs, _ = self.policy(batch.packed)
            loss = super().training_step(batch, batch_idx)
            expected = (-2.0 * batch.advantages * logprobs).sum() / batch.denominator
            self.pairs.append((loss.item(), expected.item()))
            return loss

    chosen = ChosenFunction(reinforce_loss, {"scale": 2.0})
    module, data, trainer = make(folder, tmp_path, loss=chosen, value_coef=0.0, ppo_epochs=1)
    module.__class__, module.pairs = Watch, []
    trainer.fit(module, data)
    for actual, expected in module.pairs:
        assert actual == pytest.approx(expected, rel=1e-5)


def test_a_function_is_given_the_settings_of_its_class_that_it_names_and_its_own_options_go_before(folder):
    def clipped(tokens, clip_range, sharpness=1.0):
        return ppo_policy_loss(tokens, clip_range * sharpness)

    assert PPO(str(folder), loss=clipped, clip_range=0.3).loss.keywords == {"clip_range": 0.3}
    own = ChosenFunction(clipped, {"clip_range": 0.1, "sharpness": 2.0})
    assert PPO(str(folder), loss=own).loss.keywords == {"clip_range": 0.1, "sharpness": 2.0}
    assert PPO(str(folder), loss=partial(clipped, sharpness=3.0)).loss.keywords["sharpness"] == 3.0


def test_a_setting_that_was_asked_for_and_that_the_function_does_not_name_is_refused(folder):
    with pytest.raises(UserError, match=r"reinforce_loss would ignore clip_range \(0.1\): it takes \['scale'\]"):
        PPO(str(folder), loss=reinforce_loss, clip_range=0.1)
    with pytest.raises(UserError, match=r"above_the_prompt_mean would ignore gae_lambda \(0.5\): it takes no options"):
        PPO(str(folder), advantages=above_the_prompt_mean, gae_lambda=0.5)


def without_gradient(tokens):
    return PolicyLoss(tokens.advantages, {})


def of_sequences(tokens):
    return PolicyLoss(tokens.logprobs.sum()[None], {})


def bare_tensor(tokens):
    return tokens.logprobs


def infinite(tokens):
    return PolicyLoss(tokens.logprobs / 0.0, {})


def raising(tokens):
    return tokens.nothing_of_that_name


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (without_gradient, None, "without_gradient gives losses without a gradient"),
        (of_sequences, None, "of_sequences must give a PolicyLoss, a loss per token, (M,)"),
        (bare_tensor, None, "bare_tensor must give a PolicyLoss"),
        (infinite, None, "infinite gives losses that are not finite"),
        (raising, None, "raising raised AttributeError: 'PolicyTokens' object has no attribute 'nothing_of_that_name'"),
        (
            ppo_policy_loss,
            {"clip": 0.2},
            "ppo_policy_loss would ignore clip (0.2): it takes ['clip_range', 'clip_range_high']",
        ),
        (ppo_policy_loss, {"clip_range": math.nan}, "clip_range (nan) must be more than 0"),
        (lambda tokens, slope: bare_tensor(tokens), None, "needs slope: give it in the options"),
    ],
)
def test_a_loss_that_could_not_be_trained_on_is_refused_by_name(function, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        chosen_loss(ChosenFunction(function, options))


@pytest.mark.parametrize(
    ("function", "options", "said"),
    [
        (lambda rollout: rollout.token_rewards, None, "must give Advantages, (B, T) each"),
        (lambda rollout: Advantages(rollout.scores, rollout.scores), None, "it gave [(4,), (4,)]"),
        (gae, {"gamma": 2.0}, "gamma (2.0) must be in [0, 1]"),
    ],
)
def test_an_estimator_that_gives_no_advantages_is_refused_by_name(function, options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        chosen_estimator(ChosenFunction(function, options))
