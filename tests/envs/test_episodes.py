import json

import numpy as np
import pytest
from token_tasks import END, assert_same, make, weighted_sum

from token_mdp import Episode, FinishReason


def test_episode_records_hold_what_was_played():
    env = make(num_envs=2, shuffle=False, max_episodes=3, reward_mode="deferred", reward_fn={"sum": (weighted_sum, 2)})
    env.reset()
    for actions in ([5, END], [END, 1], [0, 2], [0, 3], [0, 4]):
        env.step(np.array(actions))
    first, second, third = env.pop_episodes()
    assert (first.episode_id, first.prompt_index, first.finish_reason) == (0, 0, FinishReason.STOP)
    assert first.prompt_ids.tolist() == [1] and first.response_ids.tolist() == [5, END]
    assert first.components == {"sum": 119.0} and first.reward == 238.0  # 100·1 + 5 + 2·7
    assert second.response_ids.tolist() == [END]
    assert third.response_ids.tolist() == [1, 2, 3, 4] and third.finish_reason == FinishReason.LENGTH
    assert third.finish_reason.label == "length" and third.step_rewards is None


@pytest.mark.parametrize("step_rewards", [None, [0.5, 0.0, -1.5]])
def test_an_episode_comes_back_from_plain_values_through_json(step_rewards):
    arrays = [np.array(ids, dtype=np.int64) for ids in ([1, 2], [5, 6, END])]
    paid = None if step_rewards is None else np.array(step_rewards)
    episode = Episode(7, 2, *arrays, FinishReason.STOP, 1.5, {"sum": 3.0}, paid)
    again = Episode.from_plain(json.loads(json.dumps(episode.as_plain())))
    assert_same(again._asdict(), episode._asdict())
    assert isinstance(again.finish_reason, FinishReason)


def test_plain_values_share_no_memory_with_the_episode():
    episode = Episode(0, 0, np.array([1]), np.array([2, END]), FinishReason.LENGTH, 0.0, {}, np.zeros(2))
    plain = episode.as_plain()
    plain["response_ids"][0] = plain["step_rewards"][0] = 9
    assert episode.response_ids.tolist() == [2, END] and episode.step_rewards.tolist() == [0.0, 0.0]
