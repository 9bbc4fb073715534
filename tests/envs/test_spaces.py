import numpy as np
from gymnasium import spaces
from token_tasks import make, play, task

from token_mdp import TokenEnv


def test_the_spaces_are_those_of_the_contract():
    # P = 3, T = 4, V = 8
    env = TokenEnv(**task())
    assert env.action_space == spaces.Discrete(8)
    assert env.observation_space == spaces.Dict(
        {
            "input_ids": spaces.Box(0, 7, (7,), np.int64),
            "attention_mask": spaces.Box(0, 1, (7,), np.int8),
            "prompt_length": spaces.Box(0, 3, (1,), np.int64),
            "length": spaces.Box(0, 7, (1,), np.int64),
        }
    )
    assert TokenEnv(**task(observation="flat")).observation_space == spaces.Box(-1, 7, (7,), np.int64)


def test_single_and_vector_env_have_equal_spaces():
    for observation in ("dict", "flat"):
        single, vector = TokenEnv(**task(observation=observation)), make(observation=observation)
        assert vector.single_observation_space == single.observation_space
        assert vector.single_action_space == single.action_space
        assert vector.reset()[0] in vector.observation_space


def test_prompt_and_response_lie_side_by_side_and_a_step_writes_one_cell():
    env = TokenEnv(**task())
    env.reset(options={"prompt_index": 1})
    observation, *_ = play(env, 5, 6)
    np.testing.assert_array_equal(observation["input_ids"], [2, 3, 5, 6, 0, 0, 0])  # prompt, response, P+T=7 cells
    np.testing.assert_array_equal(observation["attention_mask"], [1, 1, 1, 1, 0, 0, 0])
    assert (observation["prompt_length"], observation["length"]) == ([2], [4])
    assert observation["input_ids"][observation["length"][0] - 1] == 6  # the newest token
    assert observation in env.observation_space


def test_flat_observation_starts_every_response_in_the_same_column():
    env = TokenEnv(**task(observation="flat"))
    for prompt_index, expected in [
        (0, [-1, -1, 1, 5, 6, -1, -1]),  # prompt of one token
        (1, [-1, 2, 3, 5, 6, -1, -1]),  # of two
        (2, [4, 5, 6, 5, 6, -1, -1]),  # of three, P
    ]:
        env.reset(options={"prompt_index": prompt_index})
        observation, *_ = play(env, 5, 6)
        np.testing.assert_array_equal(observation, expected)
        assert observation in env.observation_space
