import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.vector import AutoresetMode
from token_tasks import END, VOCAB, make

from token_mdp import RewardError


def test_same_step_refills_a_finished_slot_and_keeps_its_end_in_the_infos():
    env = make(num_envs=2, shuffle=False)
    assert env.autoreset_mode == env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    env.reset()  # prompts 0 and 1
    observations, rewards, terminated, truncated, infos = env.step(np.array([5, END]))
    np.testing.assert_array_equal(observations["input_ids"], [[1, 5, 0, 0, 0, 0, 0], [4, 5, 6, 0, 0, 0, 0]])
    np.testing.assert_array_equal(rewards, [0.0, 507.0])  # 100 (2 + 3) + 7
    np.testing.assert_array_equal(terminated, [False, True])
    assert not truncated.any() and infos["final_obs"][0] is None
    np.testing.assert_array_equal(infos["final_obs"][1]["input_ids"], [2, 3, END, 0, 0, 0, 0])
    final = infos["final_info"]
    assert (final["prompt_index"][1], final["finish_reason"][1], final["response_length"][1]) == (1, 1, 1)
    np.testing.assert_array_equal(infos["prompt_index"], [0, 2])
    np.testing.assert_array_equal(infos["episode_id"], [0, 2])


def test_next_step_spends_a_step_on_the_reset_and_ignores_its_action():
    env = make(num_envs=2, shuffle=False, autoreset_mode="NextStep")
    env.reset()
    observations, *_ = env.step(np.array([5, END]))
    np.testing.assert_array_equal(observations["input_ids"][1], [2, 3, END, 0, 0, 0, 0])
    observations, rewards, terminated, _, _ = env.step(np.array([END, VOCAB + 100]))
    np.testing.assert_array_equal(observations["input_ids"][1], [4, 5, 6, 0, 0, 0, 0])
    assert rewards[1] == 0.0 and terminated.tolist() == [True, False]


def test_disabled_leaves_resets_and_prompts_to_the_caller():
    env = make(num_envs=3, shuffle=False, autoreset_mode="Disabled")
    env.reset(options={"prompt_index": [2, 2, 2]})  # a group of one prompt
    env.step(np.array([END, 5, END]))
    with pytest.raises(ResetNeeded, match=r"slots \[0, 2\] have ended"):
        env.step(np.array([1, 1, 1]))
    options = {"reset_mask": np.array([True, False, True]), "prompt_index": np.array([0, 9, 1])}
    observations, infos = env.reset(options=options)
    assert "reset_mask" in options  # wrappers look for it after this call
    np.testing.assert_array_equal(observations["length"][:, 0], [1, 4, 2])
    np.testing.assert_array_equal(infos["_prompt_index"], [True, False, True])
    np.testing.assert_array_equal(infos["episode_id"], [3, 1, 4])
    assert infos["active"].all()


def test_max_episode_steps_shortens_the_episodes():
    env = make(num_envs=1, max_episode_steps=2)
    assert env.single_observation_space["input_ids"].shape == (5,)
    env.reset()
    env.step(np.array([1]))
    assert env.step(np.array([1]))[2][0]
    assert make(max_episode_steps=100).single_observation_space["input_ids"].shape == (7,)


@pytest.mark.parametrize("mode", ["SameStep", "Disabled"])
def test_step_before_reset_and_after_a_failed_reward_is_refused(mode):
    env = make(autoreset_mode=mode, reward_fn=lambda p, r: [float("nan")] * len(r))
    for call in (lambda: env.step(np.zeros(3, dtype=int)), env.observe):
        with pytest.raises(ResetNeeded):
            call()
    env.reset()
    with pytest.raises(RewardError):
        env.step(np.array([1, END, 1]))
    with pytest.raises(ResetNeeded):
        env.step(np.array([1, 1, 1]))
    with pytest.raises(ResetNeeded, match="reset all slots"):
        env.reset(options={"reset_mask": np.array([False, True, False])})
    env.reset()
    env.step(np.array([1, 1, 1]))


def test_a_reset_that_fails_leaves_an_env_that_wants_another():
    values = [[1.0] * 3, None, [2.0] * 3, [0.0] * 3]
    env = make(shuffle=False, potential_fn=lambda prompts, responses: values.pop(0))
    env.reset()
    with pytest.raises(RewardError, match="potential_fn must return"):
        env.reset()
    with pytest.raises(ResetNeeded, match="also after a reward function"):
        env.step(np.full(3, END))
    env.reset(options={"prompt_index": 0})
    assert env.step(np.full(3, END))[1].tolist() == [100 + END - 2.0] * 3  # Φ of this reset, not of the first


def test_the_reward_mode_is_fixed_for_the_life_of_an_env():
    env = make()
    with pytest.raises(AttributeError, match="reward_mode"):
        env.reward_mode = "deferred"
    assert (env.reward_mode, make(reward_mode="deferred").reward_mode) == ("immediate", "deferred")
