"""What the constructors of both envs refuse."""

import numpy as np
import pytest
from gymnasium import spaces
from token_tasks import task

from token_mdp import TokenEnv, TokenVectorEnv
from token_mdp.toy import ToyTokenizer


class IdsAlone:
    def decode(self, ids):
        return "text"


class InBytes:
    def decode(self, ids, skip_special_tokens=False):
        return b"text"


def envs_of(**changes):
    return [lambda: TokenEnv(**task(**changes)), lambda: TokenVectorEnv(num_envs=2, **task(**changes))]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": None}, r"prompts \(None\) must be a sequence"),
        ({"prompts": {(1,), (2,)}}, r"prompts \(\{.*\}\) must be a sequence"),
        ({"prompts": {0: [1]}}, r"prompts \(\{0: \[1\]\}\) must be a sequence"),
        ({"prompts": "text"}, r"prompts \('text'\) must be a sequence"),
        ({"tokenizer": 3}, r"tokenizer \(3\) must be None or have a method decode"),
        ({"tokenizer": 3, "reward_on": "text"}, r"tokenizer \(3\) must be None or have a method decode"),
        ({"tokenizer": IdsAlone(), "reward_on": "text"}, r"on prompts\[0\] it raised TypeError.*skip_special_tokens"),
        ({"tokenizer": ToyTokenizer, "reward_on": "text"}, r"on prompts\[0\] it raised TypeError"),
        ({"tokenizer": InBytes(), "reward_on": "text"}, r"of prompts\[0\] it made b'text'"),
        ({"prompts": {str(number): [1] for number in range(1000)}}, r"prompts \(.{80}\) must be a sequence"),
        ({"stop_token_ids": [8] * 1000}, r"stop_token_ids \(.{80}\) must be"),
        ({"limit": np.ones(2)}, r"limit \(array\(\[1., 1.\]\)\) must be one of"),
        ({"prompts": [[1], []]}, r"prompts\[1\] has no tokens"),
        ({"prompts": [[1], [2, 8]]}, r"prompts\[1\] contains token 8, outside the vocabulary 0..7"),
        ({"prompts": [[-1]]}, r"prompts\[0\] contains token -1"),
        ({"prompts": ["text"]}, r"prompts\[0\] must be a flat sequence of token ids, got 'text'; tokenise text first"),
        ({"prompts": [[0.5]]}, r"prompts\[0\] must be a flat sequence"),
        ({"prompts": [[[1]]]}, r"prompts\[0\] must be a flat sequence"),
        (
            {"prompts": [[1], [[1], [2, 3]]]},
            r"prompts\[1\] must be a flat sequence of token ids, got \[\[1\], \[2, 3\]\]",
        ),
        ({"columns": 3}, r"columns \(3\) must map names"),
        ({"columns": [1, 2, 3]}, r"columns \(\[1, 2, 3\]\) must map names"),
        ({"columns": {"answer": 3}}, r"columns\['answer'\] \(3\) must be a sequence"),
        ({"columns": {"answer": {1, 2, 3}}}, r"columns\['answer'\] \(\{1, 2, 3\}\) must be a sequence"),
        ({"columns": {"answer": {0: 1, 1: 2, 2: 3}}}, r"columns\['answer'\] .* must be a sequence"),
        ({"columns": {"answer": "abc"}}, r"columns\['answer'\] \('abc'\) must be a sequence"),
        ({"columns": {3: [1, 2, 3]}}, r"columns\[3\]: the name must be a string"),
        ({"gamma": "x", "potential_fn": len}, r"gamma \('x'\) must be a number in 0..1"),
        ({"shuffle": "no"}, r"shuffle \('no'\) must be True or False"),
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"stop_token_ids": [8]}, r"stop_token_ids \(\[8\]\) must be token ids inside the vocabulary 0..7"),
        ({"stop_token_ids": [-1]}, r"stop_token_ids \(\[-1\]\)"),
        ({"stop_token_ids": ["eos"]}, r"stop_token_ids \(\['eos'\]\)"),
        ({"stop_token_ids": {8}}, r"stop_token_ids \(\[8\]\) must be token ids inside"),
        ({"stop_token_ids": [[1, 2], [3]]}, r"stop_token_ids \(\[\[1, 2\], \[3\]\]\) must be token ids inside"),
        ({"max_new_tokens": 0}, r"max_new_tokens \(0\) must be an integer and at least 1"),
        ({"max_new_tokens": -3}, r"max_new_tokens \(-3\)"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens \(2.5\)"),
        ({"max_new_tokens": "4"}, r"max_new_tokens \('4'\)"),
        ({"max_prompt_length": 0}, r"max_prompt_length \(0\) must be an integer and at least 1"),
        ({"process_reward_fn": 3}, r"process_reward_fn \(3\) must be None or a function"),
        ({"potential_fn": "length"}, r"potential_fn \('length'\) must be None or a function"),
        ({"reward_fn": None}, "reward_fn is missing"),
        ({"reward_fn": "score"}, "reward_fn must be a function"),
        ({"columns": {"answer": [1, 2]}}, r"columns\['answer'\] has 2 rows, but there are 3 prompts"),
        ({"columns": {"prompts": [1, 2, 3]}}, r"columns\['prompts'\] would hide"),
        ({"limit": "stop"}, r"limit \('stop'\) must be one of"),
        ({"observation": "text"}, r"observation \('text'\) must be one of"),
        ({"reward_on": "words"}, r"reward_on \('words'\) must be one of"),
        ({"reward_on": "text"}, "reward_on='text' needs a tokenizer"),
        ({"action_mask": "all"}, "action_mask must be None, a bool or a function"),
        ({"render_mode": "rgb_array"}, r"render_mode \('rgb_array'\) must be None or one of"),
        ({"step_boundary_ids": [1]}, "needs process_reward_fn"),
        ({"step_boundary_ids": [9], "process_reward_fn": len}, r"step_boundary_ids \(\[9\]\)"),
        ({"gamma": 0.9}, r"gamma \(0.9\).*needs potential_fn"),
        ({"gamma": 1.5, "potential_fn": len}, r"gamma \(1.5\) must be a number in 0..1"),
    ],
)
def test_bad_arguments_are_refused_with_their_values(changes, message):
    for make in envs_of(**changes):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_envs": 0}, r"num_envs \(0\)"),
        ({"reward_mode": "later"}, r"reward_mode \('later'\)"),
        (
            {"autoreset_mode": "Sometimes"},
            r"autoreset_mode \('Sometimes'\) must be one of \('NextStep', 'SameStep', 'Dis",
        ),
        ({"copy": "no"}, r"copy \('no'\) must be True or False"),
        ({"max_new_tokens": "4", "max_episode_steps": 3}, r"max_new_tokens \('4'\) must be an integer"),
        ({"max_episodes": 0}, r"max_episodes \(0\)"),
        ({"max_episode_steps": 0}, r"max_episode_steps \(0\)"),
    ],
)
def test_bad_arguments_of_the_vector_env_are_refused_with_their_values(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenVectorEnv(**{"num_envs": 2} | task(**changes))


def test_prompts_may_be_lists_or_integer_arrays_and_one_stop_token_may_be_an_int():
    env = TokenEnv(**task(prompts=[np.array([1], dtype=np.int32), (2, 3)], stop_token_ids=7))
    observation, _ = env.reset(options={"prompt_index": 1})
    assert observation["input_ids"].dtype == np.int64
    assert env.step(7)[2]


@pytest.mark.parametrize("ids", [{3, 7}, frozenset({3, 7}), (token for token in (3, 7)), range(3, 8, 4)])
def test_stop_tokens_may_be_any_collection_of_ids(ids):
    env = TokenEnv(**task(stop_token_ids=ids))
    for token, ends in ((3, True), (7, True), (5, False)):
        env.reset()
        assert env.step(token)[2] == ends


def test_an_empty_set_of_stop_tokens_leaves_the_limit_alone():
    env = TokenEnv(**task(stop_token_ids=set(), max_new_tokens=2))
    env.reset()
    assert [env.step(token)[2] for token in (7, 7)] == [False, True]


class ByLabel(list):
    """Like a column of pandas whose rows were turned round: an index is a label, iteration goes by position."""

    def __getitem__(self, label):
        return super().__getitem__(len(self) - 1 - label)


def test_columns_go_with_the_prompts_by_position_not_by_label():
    seen = []

    def reward(prompts, responses, name):
        seen.extend(zip([prompt.tolist() for prompt in prompts], name, strict=True))
        return [0.0] * len(responses)

    env = TokenVectorEnv(
        num_envs=3, **task(shuffle=False, reward_fn=reward, columns={"name": ByLabel(["one", "two", "three"])})
    )
    env.reset()
    env.step(np.full(3, 7))
    assert seen == [([1], "one"), ([2, 3], "two"), ([4, 5, 6], "three")]


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


def test_all_arguments_but_the_prompts_go_by_name():
    for make in (TokenEnv, TokenVectorEnv):
        with pytest.raises(TypeError, match="takes 2 positional arguments"):
            make([[1]], 8, stop_token_ids=7, max_new_tokens=4, reward_fn=len)
