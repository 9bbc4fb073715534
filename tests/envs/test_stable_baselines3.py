"""Stable-Baselines3 and sb3-contrib play the env: single ones, and the native vector env through the adapter."""

import gymnasium
import numpy as np
import pytest
from token_tasks import VOCAB, task, toy_score

pytest.importorskip("stable_baselines3", reason="needs the extra `agents`")
pytest.importorskip("sb3_contrib", reason="needs the extra `agents`")

import torch
from sb3_contrib import MaskablePPO, RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecMonitor

from token_mdp.registration import IDS
from token_mdp.sb3 import SB3VecEnv


def native(num_envs=4, **arguments):
    return SB3VecEnv(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=num_envs, **arguments))


def single():
    return gymnasium.make("LitRLHF/Token-v0")


BOTH = "single, native through `SB3VecEnv`"


@pytest.mark.plays("stable_baselines3", "`check_env`", "single, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_the_checker_of_stable_baselines3_accepts_every_registered_id(env_id):
    check_env(gymnasium.make(env_id), warn=True)  # its warnings are errors here


@pytest.mark.plays("stable_baselines3", "PPO and `make_vec_env` by id", "single, Dict and flat")
@pytest.mark.parametrize(("env_id", "policy"), list(zip(IDS, ["MultiInputPolicy", "MlpPolicy"], strict=True)))
def test_stable_baselines3_makes_the_env_by_its_id(env_id, policy):
    learns_something(PPO(policy, env_id, n_steps=16, batch_size=16, device="cpu", seed=0), steps=32)
    env = make_vec_env(env_id, n_envs=2, env_kwargs=task())
    assert env.action_space.n == VOCAB


def learns_something(model, steps):
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(steps)
    assert any(not torch.equal(old, new) for old, new in zip(before, model.policy.parameters(), strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in model.policy.parameters())


@pytest.mark.parametrize("make", [single, native])
@pytest.mark.parametrize(
    ("algorithm", "policy", "arguments"),
    [
        pytest.param(
            PPO,
            "MultiInputPolicy",
            {"n_steps": 16, "batch_size": 16},
            marks=pytest.mark.plays("stable_baselines3", "PPO, `MultiInputPolicy`", BOTH),
        ),
        pytest.param(
            A2C, "MultiInputPolicy", {}, marks=pytest.mark.plays("stable_baselines3", "A2C, `MultiInputPolicy`", BOTH)
        ),
        pytest.param(
            DQN,
            "MultiInputPolicy",
            {"buffer_size": 200, "learning_starts": 20},
            marks=pytest.mark.plays("stable_baselines3", "DQN, `MultiInputPolicy`", BOTH),
        ),
        pytest.param(
            MaskablePPO,
            "MultiInputPolicy",
            {"n_steps": 16, "batch_size": 16},
            marks=pytest.mark.plays("sb3_contrib", "MaskablePPO, `MultiInputPolicy`", BOTH),
        ),
        pytest.param(
            RecurrentPPO,
            "MultiInputLstmPolicy",
            {"n_steps": 16, "batch_size": 16},
            marks=pytest.mark.plays("sb3_contrib", "RecurrentPPO, `MultiInputLstmPolicy`", BOTH),
        ),
    ],
)
def test_an_algorithm_trains_on_a_single_env_and_on_the_adapter(algorithm, policy, arguments, make):
    learns_something(algorithm(policy, make(), device="cpu", seed=0, **arguments), steps=128)


def one_letter_less(prompts, responses):
    """The token that a response ended in may not come again, so that the mask changes at every step."""
    allowed = np.ones((len(responses), 6), dtype=bool)
    for row, response in enumerate(responses):
        allowed[row, response[-1:]] = False
    return allowed


@pytest.mark.plays("sb3_contrib", "MaskablePPO with a mask per state", BOTH)
@pytest.mark.parametrize(
    "make",
    [
        lambda: gymnasium.make("LitRLHF/Token-v0", action_mask=one_letter_less),
        lambda: native(action_mask=one_letter_less),
    ],
    ids=["single", "native"],
)
def test_maskable_ppo_never_takes_a_token_that_action_masks_forbids(make):
    # The env raises InvalidAction for such a token, as it does for an agent that knows no masks:
    learns_something(MaskablePPO("MultiInputPolicy", make(), n_steps=64, batch_size=64, device="cpu", seed=0), 256)
    with pytest.raises(gymnasium.error.InvalidAction, match="not allowed"):
        PPO("MultiInputPolicy", make(), n_steps=64, batch_size=64, device="cpu", seed=0).learn(256)


@pytest.mark.plays("stable_baselines3", "PPO solves the toy task", "native through `SB3VecEnv`")
def test_ppo_of_stable_baselines3_solves_the_toy_task():
    env = VecMonitor(native(num_envs=64))
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=16,
        batch_size=256,
        n_epochs=4,
        learning_rate=3e-3,
        gamma=1.0,
        ent_coef=0.01,
        seed=0,
        device="cpu",
    )

    def greedy(observations):
        return model.predict(observations, deterministic=True)[0]

    assert toy_score(greedy) < 0.5
    model.learn(40_000)
    assert toy_score(greedy) >= 0.9  # the best is 1
    assert np.mean([episode["r"] for episode in model.ep_info_buffer]) >= 0.9
    assert evaluate_policy(model, env, n_eval_episodes=64)[0] >= 0.9


class LargestReward(BaseCallback):
    """The largest reward that PPO was trained on."""

    largest = -np.inf

    def _on_step(self):
        return True

    def _on_rollout_end(self):
        self.largest = max(self.largest, float(self.model.rollout_buffer.rewards.max()))


def reward_ppo_trains_on(limit):
    # The longer the better: the best response never stops, and earns 1.
    arguments = {"prompts": [[2]], "vocab_size": 3, "stop_token_ids": 0, "max_new_tokens": 8}
    env = native(num_envs=16, reward_fn=lambda p, r: [len(x) / 8 for x in r], limit=limit, **arguments)
    model = PPO(
        "MultiInputPolicy",
        env,
        n_steps=16,
        batch_size=64,
        n_epochs=4,
        learning_rate=3e-3,
        gamma=1.0,
        seed=0,
        device="cpu",
    )
    rewards = LargestReward()
    model.learn(256 * 15, callback=rewards)
    return rewards.largest, float(model.rollout_buffer.values.max())


@pytest.mark.plays(
    "stable_baselines3", "PPO at the length limit: rewards stay what was paid", "native through `SB3VecEnv`"
)
def test_the_length_limit_terminates_and_so_no_reward_blows_up():
    largest, value = reward_ppo_trains_on("terminate")
    assert largest == 1.0
    assert value < 1.5


def test_a_truncating_limit_blows_rewards_up_as_the_docs_warn():
    # Stable-Baselines3 adds γV(final observation) to a reward that is complete; nothing ever trains that value.
    largest, _ = reward_ppo_trains_on("truncate")
    assert largest > 5.0
