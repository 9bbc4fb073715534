import re

import numpy as np
import pytest
from token_tasks import END, make, task

from token_mdp import TokenEnv, TokenVectorEnv


def test_unknown_options_and_prompts_are_refused():
    env = TokenEnv(**task())
    with pytest.raises(ValueError, match="'prompt'"):
        env.reset(options={"prompt": 1})
    with pytest.raises(ValueError, match=r"\[1, 'prompt'\] are unknown"):
        env.reset(options={1: 1, "prompt": 1})
    for index in (-1, 3, 1.0, True, [[1], [1, 2]]):
        with pytest.raises(ValueError, match=rf"prompt_index \({re.escape(str(index))}\) must be an integer in 0..2"):
            env.reset(options={"prompt_index": index})


@pytest.mark.parametrize("made", [TokenEnv(**task()), make()])
@pytest.mark.parametrize("options", [5, 0, "", "prompt_index", [("prompt_index", 1)], ["prompt_index"], True])
def test_options_that_are_no_mapping_are_refused_as_such(made, options):
    with pytest.raises(
        ValueError, match=rf"reset options \({re.escape(repr(options))}\) must be None or a dict of 'p|'m"
    ):
        made.reset(options=options)


@pytest.mark.parametrize(
    "seed", [[1, 2], [1, 2, 3, 4], [], [1, -1, 2], [1, 2.0, 3], [1, "2", 3], "123", -1, 1.0, {}, [[1]] * 3]
)
def test_seeds_that_are_not_one_for_each_slot_are_refused(seed):
    env = make()
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=rf"seed \({re.escape(repr(seed))}\) must be None, an integer.*or 3 of these"):
        env.reset(seed=seed)
    assert env.state_dict() == before


@pytest.mark.parametrize(
    "seed", [np.int64(7), [7, 8, 9], (7, 7, 7), np.array([7, 1, 2]), [None, 7, 9], [7, None, None]]
)
def test_the_first_seed_of_a_list_shuffles_the_prompts_for_all_slots(seed):
    one, several = make(), make()
    one.reset(seed=7)
    several.reset(seed=seed)
    assert several.state_dict() == one.state_dict()


def test_a_list_without_a_seed_goes_on_with_the_queue():
    one, several = make(), make()
    for env, nothing in ((one, None), (several, [None] * 3)):
        env.reset(seed=0)
        env.reset(seed=nothing)
    assert several.state_dict() == one.state_dict()


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
@pytest.mark.parametrize("index", [1, np.int32(1), np.array(1)])
def test_a_prompt_may_be_picked_by_any_integer_scalar(make, index):
    assert make(**task()).reset(options={"prompt_index": index})[1]["prompt_index"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": 1}, "'mask'"),
        ({"max_episodes": 0}, r"max_episodes \(0\)"),
        ({"prompt_index": 3}, r"prompt_index \(3\) must be an integer in 0..2"),
        ({"prompt_index": True}, r"prompt_index \(True\) must be an integer"),
        ({"prompt_index": [0, 1]}, r"got shape \(2,\)"),
        ({"prompt_index": [[0], [1, 2], [0]]}, r"prompt_index \(\[0\]\) must be an integer"),
        ({1: 2, "mask": 3}, r"\[1, 'mask'\] are unknown"),
        ({"reset_mask": [True, False, True]}, "must be a bool array"),
        ({"reset_mask": np.zeros(3, dtype=bool)}, "False everywhere"),
        ({"reset_mask": np.ones(3, dtype=bool), "max_episodes": 3}, "pass one of them"),
    ],
)
def test_bad_reset_options_are_refused(options, message):
    env = make()
    env.reset(seed=0)
    before = env.state_dict()
    with pytest.raises(ValueError, match=message):
        env.reset(options=options)
    assert env.state_dict() == before  # and change nothing


def test_the_first_reset_may_carry_a_mask_of_all_slots():
    env = make(num_envs=2, shuffle=False, autoreset_mode="Disabled")
    _, infos = env.reset(options={"reset_mask": np.ones(2, dtype=bool), "prompt_index": 1})
    assert infos["prompt_index"].tolist() == [1, 1]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_first_reset_with_a_mask_starts_a_stream_of_max_episodes(loaded):
    env = make(num_envs=2, max_episodes=3, autoreset_mode="Disabled")
    if loaded:
        env.load_state_dict(make(num_envs=2, max_episodes=3, autoreset_mode="Disabled").state_dict())
    every = {"reset_mask": np.ones(2, dtype=bool)}
    played = []
    for _ in range(2):
        played += env.reset(seed=0, options=every)[1]["episode_id"][env.active].tolist()
        env.step(np.array([END, END]))
    assert played == [0, 1, 2] and not env.active.any()


def test_a_seed_with_a_reset_mask_starts_the_queue_over_and_goes_on_with_the_stream():
    env = make(num_envs=2, reward_mode="deferred", autoreset_mode="Disabled")
    first = env.reset(seed=0)[1]
    env.step(np.array([END, END]))
    again = env.reset(seed=0, options={"reset_mask": np.ones(2, dtype=bool)})[1]
    assert again["prompt_index"].tolist() == first["prompt_index"].tolist() and again["episode_id"].tolist() == [2, 3]
    assert [episode.episode_id for episode in env.pop_episodes()] == [0, 1]
