import numpy as np
from token_tasks import END, make, weighted_sum

from token_mdp import FinishReason


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
