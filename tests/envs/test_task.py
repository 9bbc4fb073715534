"""What the constructors of both envs refuse; action masks and text, as the task hands them on."""

import gymnasium
import numpy as np
import pytest
from token_tasks import END, VOCAB, task

from token_mdp import RewardError, TokenEnv, TokenVectorEnv
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
        ({"render_mode": "depth_array"}, r"render_mode \('depth_array'\) must be None or one of"),
        ({"max_new_tokens": 10**12}, r"max_new_tokens \(10{12}\), .* would take about 48,000 GB; this machine has"),
        ({"max_prompt_length": 10**15}, r"max_prompt_length \(10{15}\) .* would take about 48,000,000 GB"),
        ({"vocab_size": 10**13}, r"vocab_size \(10{13}\) would take about 10,000 GB"),
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
        ({"num_envs": 10**12}, r"num_envs \(10{12}\) slots of 7 tokens would take about 336,000 GB; this machine has"),
        ({"num_envs": 10**12, "observation": "flat"}, r"num_envs \(10{12}\) slots of 7 tokens would"),
        (
            {"num_envs": 10**6, "vocab_size": 10**6, "action_mask": True},
            r"num_envs \(10{6}\) slots of 7 tokens and 10{6} flags would take about 2,000 GB",
        ),
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


def test_all_arguments_but_the_prompts_go_by_name():
    for make in (TokenEnv, TokenVectorEnv):
        with pytest.raises(TypeError, match="takes 2 positional arguments"):
            make([[1]], 8, stop_token_ids=7, max_new_tokens=4, reward_fn=len)


def test_without_an_action_mask_all_tokens_are_allowed_and_info_stays_small():
    env = TokenEnv(**task())
    assert "action_mask" not in env.reset()[1]
    assert env.action_masks().all() and env.action_masks().dtype == np.bool_
    info = TokenEnv(**task(action_mask=True)).reset()[1]
    assert info["action_mask"].dtype == np.int8 and info["action_mask"].all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.ones((1, 3)), r"must return shape \(1, 8\), got \(1, 3\)"),
        (np.zeros((1, VOCAB)), r"at least one token per row, rows \[0\] have none"),
    ],
)
def test_an_action_mask_of_the_wrong_shape_or_without_a_token_is_refused(bad, message):
    env = TokenEnv(**task(action_mask=lambda prompts, responses: bad))
    with pytest.raises(ValueError, match=message + r".*prompt indices \[2\]"):
        env.reset(options={"prompt_index": 2})


@pytest.mark.parametrize(
    ("mask", "shown"),
    [
        (np.where(np.arange(VOCAB) == 3, -np.inf, 0.0)[None], "-inf"),  # to add to logits: 0 means yes there
        (np.full((1, VOCAB), np.nan), "nan"),
        (np.full((1, VOCAB), 0.5), "0.5"),
        (np.full((1, VOCAB), 2), "2"),
        ([["no"] * VOCAB], "'no'"),
        ([[None] * VOCAB], "None"),
        (None, "None"),
        ([[True], [True, False]], r"\[True\]"),
    ],
)
def test_an_action_mask_that_is_neither_bool_nor_0_and_1_is_refused(mask, shown):
    env = TokenEnv(**task(action_mask=lambda prompts, responses: mask))
    with pytest.raises(ValueError, match=rf"must return True \(or 1\).*got .*{shown}.*prompt indices \[2\]"):
        env.reset(options={"prompt_index": 2})


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, np.int64, np.float32])
def test_an_action_mask_may_be_bool_or_0_and_1(make, dtype):
    mask = np.array([[1, 0] * 4], dtype=dtype)
    env = make(**task(action_mask=lambda prompts, responses: mask))
    env.reset()
    mask[:] = 1  # the function's buffer, not the env's
    assert env.action_masks().ravel().tolist() == [True, False] * 4


def test_an_action_mask_may_be_a_tensor_with_a_gradient_or_in_bfloat16():
    torch = pytest.importorskip("torch")
    for tensor in (torch.ones(1, VOCAB, requires_grad=True), torch.ones(1, VOCAB, dtype=torch.bfloat16)):
        env = TokenEnv(**task(action_mask=lambda prompts, responses, tensor=tensor: tensor))
        env.reset()
        assert env.action_masks().all()


def test_a_tokenizer_that_fails_is_named_with_the_prompts():
    class Failing:
        def decode(self, ids, skip_special_tokens=False):
            if END in ids:
                raise UnicodeError("half a character")
            return "text"

    env = TokenEnv(**task(tokenizer=Failing(), reward_on="text"))
    env.reset(options={"prompt_index": 2})
    with pytest.raises(RewardError, match=r"tokenizer.decode raised UnicodeError.*prompt indices \[2\]"):
        env.step(END)


def test_rewards_on_text_get_decoded_strings_without_special_tokens():
    seen = []

    def reward(prompts, responses):
        seen.extend([prompts, responses])
        return [1.0]

    env = gymnasium.make("LitRLHF/Token-v0", reward_fn=reward, reward_on="text")
    env.reset(options={"prompt_index": 6})
    env.step(1)
    env.step(0)
    assert seen == [["a c →"], ["a"]]
