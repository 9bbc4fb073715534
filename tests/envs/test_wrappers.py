"""Gymnasium's own wrappers, vectorisers and a plain tabular agent on the env."""

import copy

import gymnasium
import numpy as np
import pytest
from gymnasium import wrappers
from gymnasium.wrappers import vector as vector_wrappers
from gymnasium.wrappers.utils import RunningMeanStd
from token_tasks import END, assert_same, task, weighted_sum

from token_mdp import TokenEnv, TokenVectorEnv
from token_mdp.registration import IDS


def finish(env, token=END):
    env.reset(seed=0, options={"prompt_index": 1})
    env.step(1)
    return env.step(token)


@pytest.mark.plays("gymnasium", "`RecordEpisodeStatistics`", "single")
def test_record_episode_statistics_sees_return_and_length():
    env = wrappers.RecordEpisodeStatistics(gymnasium.make("LitRLHF/Token-v0", **task()))
    *_, info = finish(env)
    assert info["episode"]["r"] == 100 * 5 + 1 + 2 * END and info["episode"]["l"] == 2


@pytest.mark.plays("gymnasium", "`FlattenObservation`", "single")
def test_flatten_observation_gives_one_box():
    env = wrappers.FlattenObservation(TokenEnv(**task()))
    observation, *_ = finish(env)
    assert observation.shape == env.observation_space.shape == (7 + 7 + 1 + 1,)
    assert observation in env.observation_space


@pytest.mark.plays("gymnasium", "`NormalizeReward`, `TransformReward`", "single")
def test_normalize_and_transform_reward_leave_the_rest_alone():
    env = wrappers.NormalizeReward(TokenEnv(**task(reward_fn=weighted_sum)))
    _, reward, terminated, _, info = finish(env)
    assert terminated and info["finish_reason"] == 1
    variance = RunningMeanStd()  # of the discounted returns, 0 and what this episode paid
    variance.update(np.array([0.0]))
    variance.update(np.array([500.0 + 1 + 2 * END]))
    assert reward == pytest.approx((500 + 1 + 2 * END) / np.sqrt(variance.var + env.epsilon))
    env = wrappers.TransformReward(TokenEnv(**task()), lambda reward: -reward)
    assert finish(env)[1] == -(100 * 5 + 1 + 2 * END)


@pytest.mark.plays("gymnasium", "vector `RecordEpisodeStatistics`", "native, SameStep and NextStep")
@pytest.mark.parametrize("mode", ["SameStep", "NextStep"])
def test_vector_record_episode_statistics_sees_every_episode(mode):
    env = TokenVectorEnv(num_envs=2, shuffle=False, autoreset_mode=mode, **task())
    wrapped = vector_wrappers.RecordEpisodeStatistics(env)
    wrapped.reset(seed=0)
    for actions in ([1, END], [END, 1], [1, 1], [1, 1]):
        wrapped.step(np.array(actions))
    assert wrapped.episode_count == 2
    assert list(wrapped.length_queue) == [1, 2]
    assert list(wrapped.return_queue) == [507.0, 115.0]  # prompt 1: 500 + 7; prompt 0: 100 + 1 + 2·7


def test_vector_record_episode_statistics_finds_the_reset_mask():
    env = TokenVectorEnv(num_envs=2, shuffle=False, autoreset_mode="Disabled", **task())
    wrapped = vector_wrappers.RecordEpisodeStatistics(env)
    wrapped.reset()
    wrapped.step(np.array([1, END]))
    wrapped.reset(options={"reset_mask": np.array([False, True])})
    np.testing.assert_array_equal(wrapped.episode_lengths, [1, 0])


@pytest.mark.plays("gymnasium", "vector `FlattenObservation`, `NormalizeReward`, `DictInfoToList`", "native, NextStep")
def test_vector_wrappers_flatten_observations_normalize_rewards_and_list_infos():
    env = TokenVectorEnv(num_envs=3, shuffle=False, autoreset_mode="NextStep", **task())  # flattening needs it
    single_space = env.single_observation_space
    normalized = vector_wrappers.NormalizeReward(env)
    env = vector_wrappers.DictInfoToList(vector_wrappers.FlattenObservation(normalized))
    observations, infos = env.reset(seed=0)
    assert observations in env.observation_space
    assert [info["prompt_index"] for info in infos] == [0, 1, 2]

    observations, rewards, *_, infos = env.step(np.array([1, END, 1]))
    ended = {
        "input_ids": np.array([2, 3, END, 0, 0, 0, 0]),
        "attention_mask": np.array([1, 1, 1, 0, 0, 0, 0], dtype=np.int8),
        "prompt_length": np.array([2]),
        "length": np.array([3]),
    }
    np.testing.assert_array_equal(observations[1], gymnasium.spaces.flatten(single_space, ended))
    # Paid: 0, 100 (2 + 3) + 7, 0; divided by the deviation of the returns so far, up to a prior that weighs 1e-4.
    np.testing.assert_allclose(rewards, [0.0, 507 / np.std([0, 507, 0]), 0.0], rtol=1e-3)
    assert [("finish_reason" in info) for info in infos] == [False, True, False]

    _, rewards, *_, infos = env.step(np.array([END, 1, 1]))  # slot 1 is being reset, which pays nothing
    np.testing.assert_allclose(rewards * np.sqrt(normalized.return_rms.var), [115.0, 0.0, 0.0])
    assert [info["prompt_index"] for info in infos] == [0, 0, 2]


def rollout(env, steps=12):
    history = [copy.deepcopy(env.reset(seed=5))]
    for step in range(steps):
        history.append(copy.deepcopy(env.step(np.array([step % 6, 0]))))
    env.close()
    return history


@pytest.mark.plays("gymnasium", "spawned `AsyncVectorEnv` equals `SyncVectorEnv`", "single, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_spawned_workers_play_the_same_episodes_as_a_loop_in_this_process(env_id):
    spawned = gymnasium.make_vec(
        f"token_mdp:{env_id}", 2, vectorization_mode="async", vector_kwargs={"context": "spawn"}
    )
    assert_same(rollout(spawned), rollout(gymnasium.make_vec(env_id, 2, vectorization_mode="sync")))
