import numpy as np
import pytest
from token_tasks import END, NEWLINE, drain, ends_of_all_slots, make, newest_token, task, weighted_sum, zero

from token_mdp import RewardError, TokenVectorEnv


def test_deferred_rewards_equal_immediate_ones_and_are_scored_in_one_call():
    batches = []

    def reward(prompts, responses):
        batches.append(len(responses))
        return weighted_sum(prompts, responses)

    immediate = make(num_envs=4, max_episodes=13)
    expected = {}
    for _, rewards, terminated, _, infos in drain(immediate, np.random.default_rng(0), seed=5):
        for slot in np.flatnonzero(terminated):
            expected[infos["final_info"]["episode_id"][slot]] = rewards[slot]

    deferred = make(num_envs=4, max_episodes=13, reward_mode="deferred", reward_fn=reward)
    transitions = drain(deferred, np.random.default_rng(0), seed=5)
    assert all(not rewards.any() for _, rewards, *_ in transitions) and batches == []
    ids, rewards = deferred.flush_rewards()
    assert batches == [13]
    assert ids.tolist() == list(range(13)) and ids.dtype == np.int64 and rewards.dtype == np.float64
    assert rewards.tolist() == [expected[i] for i in range(13)]
    ids, rewards = deferred.flush_rewards()  # nothing is left
    assert ids.shape == rewards.shape == (0,) and batches == [13]


def test_episodes_can_be_taken_unscored():
    env = make(num_envs=1, max_episodes=1, reward_mode="deferred", reward_fn=lambda p, r: 1 / 0)
    drain(env, np.random.default_rng(0))
    (episode,) = env.pop_episodes(score=False)
    assert np.isnan(episode.reward)
    with pytest.raises(ValueError, match=r"score \('no'\) must be True or False"):
        env.pop_episodes(score="no")


def test_a_failed_flush_keeps_the_episodes():
    faults = [True]

    def reward(prompts, responses):
        if faults:
            raise ConnectionError("reward server")
        return np.ones(len(responses))

    env = make(num_envs=2, max_episodes=4, reward_mode="deferred", reward_fn=reward)
    drain(env, np.random.default_rng(0))
    with pytest.raises(RewardError, match="reward server"):
        env.flush_rewards()
    faults.clear()
    assert env.flush_rewards()[1].tolist() == [1.0] * 4


def test_after_a_failed_flush_the_episodes_under_way_go_on():
    faults = [True]
    env = make(reward_mode="deferred", reward_fn=lambda p, r: [None if faults else 1.0] * len(r))
    env.reset(seed=0)
    env.step(np.array([END, 1, 1]))
    with pytest.raises(RewardError):
        env.pop_episodes()
    env.step(np.array([1, END, 1]))
    faults.clear()
    assert env.flush_rewards()[0].tolist() == [0, 1]


def test_a_seeded_reset_drops_episodes_that_were_not_flushed_and_another_keeps_them():
    env = make(num_envs=1, max_episodes=2, reward_mode="deferred")
    drain(env, np.random.default_rng(0), seed=0)
    env.reset()
    assert [episode.episode_id for episode in env.pop_episodes()] == [0, 1]
    drain(env, np.random.default_rng(0), seed=0)
    env.reset(seed=0)
    assert env.pop_episodes() == []


def test_reward_functions_cannot_reach_the_records():
    def vandal(prompts, responses):
        for ids in prompts + responses:
            ids[:] = 0
        return np.zeros(len(responses))

    env = make(num_envs=1, shuffle=False, max_episodes=1, reward_mode="deferred", reward_fn=vandal)
    env.reset()
    env.step(np.array([END]))
    (episode,) = env.pop_episodes()
    assert episode.prompt_ids.tolist() == [1] and episode.response_ids.tolist() == [END]


def test_immediate_mode_keeps_no_episodes():
    env = make()
    with pytest.raises(ValueError, match="reward_mode='deferred'"):
        env.flush_rewards()


def test_the_vector_env_asks_for_all_process_rewards_of_a_step_in_one_call():
    batches = []

    def score(prompts, responses, name):
        batches.append(name)
        return np.ones(len(responses))

    arguments = task(process_reward_fn=score, step_boundary_ids=NEWLINE, columns={"name": ["a", "b", "c"]})
    arguments["reward_fn"] = lambda prompts, responses, name: np.zeros(len(responses))
    env = TokenVectorEnv(num_envs=3, shuffle=False, **arguments)
    env.reset()
    env.step(np.array([1, 1, 1]))
    _, rewards, *_ = env.step(np.array([NEWLINE, 1, END]))
    assert batches == [["a", "c"]]
    assert rewards.tolist() == [1.0, 0.0, 1.0]


def test_a_step_that_closes_nowhere_looks_at_no_response(monkeypatch):
    # Responses are long: looking at all of them would make every step cost by their length.
    asked = []
    arguments = task(process_reward_fn=newest_token, step_boundary_ids=NEWLINE, reward_fn=zero, max_new_tokens=9)
    env = TokenVectorEnv(num_envs=3, **arguments)
    env.reset()
    responses = env._slots.responses
    monkeypatch.setattr(env._slots, "responses", lambda slots: asked.append(slots.tolist()) or responses(slots))
    env.step(np.array([1, 1, 1]))
    assert asked == []
    env.step(np.array([1, NEWLINE, 1]))
    assert asked == [[1]]


def test_deferred_mode_pays_steps_at_once_and_keeps_them_in_the_records():
    env = TokenVectorEnv(
        num_envs=1, max_episodes=1, reward_mode="deferred", **task(process_reward_fn=newest_token, reward_fn=zero)
    )
    env.reset()
    paid = [env.step(np.array([token]))[1][0] for token in (2, 4, END)]
    (episode,) = env.pop_episodes()
    assert paid == episode.step_rewards.tolist() == [2.0, 4.0, END]
    assert episode.reward == 0.0


def test_all_slots_that_end_in_a_step_are_scored_in_one_call():
    batches = []

    def reward(prompts, responses):
        batches.append(len(responses))
        return np.zeros(len(responses))

    ends_of_all_slots(reward_fn=reward)
    assert batches == [3]
