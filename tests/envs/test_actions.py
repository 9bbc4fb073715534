import numpy as np
import pytest
from gymnasium.error import InvalidAction
from token_tasks import VOCAB, make, only_even_tokens, task

from token_mdp import TokenEnv


@pytest.mark.parametrize("action", [-1, VOCAB, 1.5, "a", None, [1, 2], [[1], [1, 2]]])
def test_a_token_outside_the_vocabulary_is_refused_with_its_value(action):
    env = TokenEnv(**task())
    env.reset()
    with pytest.raises(InvalidAction) as error:
        env.step(action)
    assert str(action) in str(error.value)


@pytest.mark.parametrize("action", [3, np.int32(3), np.array(3), np.array([3])])
def test_an_action_may_be_any_integer_scalar(action):
    env = TokenEnv(**task())
    env.reset(options={"prompt_index": 0})
    assert env.step(action)[0]["input_ids"][1] == 3


def test_an_action_mask_function_restricts_the_tokens():
    env = TokenEnv(**task(action_mask=only_even_tokens))
    _, info = env.reset()
    np.testing.assert_array_equal(info["action_mask"], np.array([1, 0] * 4, dtype=np.int8))
    np.testing.assert_array_equal(env.action_masks(), [True, False] * 4)
    env.step(2)
    env.action_masks()[:] = True  # a copy: it allows nothing
    with pytest.raises(InvalidAction, match="token 3 is not allowed"):
        env.step(3)


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ([1, -1, 8], r"tokens \[-1, 8\] in slots \[1, 2\] are outside the vocabulary 0..7"),
        ([-1] * 12, r"tokens \[-1(, -1){9}\] in slots \[0, .*, 9\] and 2 more are outside"),
        ([1, 2], r"3 integer token ids, got shape \(2,\)"),
        (np.array([1, 2, 2**64 - 1], dtype=np.uint64), r"tokens \[18446744073709551615\] in slots \[2\]"),
        ([1.0, 2.0, 3.0], "float64"),
        ([[1], [2], [3]], r"got shape \(3, 1\)"),
        (np.ma.array([1, 2, 3], mask=[0, 1, 0]), r"got shape \(3,\) of object"),
        ([[1], [1, 2], [3]], r"got shape \(3,\) of object"),
    ],
)
def test_bad_actions_name_slots_and_tokens(actions, message):
    env = make(num_envs=max(len(actions), 3))
    env.reset()
    with pytest.raises(InvalidAction, match=message):
        env.step(actions)


def test_tokens_outside_the_action_mask_name_slots_and_tokens():
    def no_threes(prompts, responses):
        return np.arange(VOCAB) != np.full((len(responses), 1), 3)

    env = make(action_mask=no_threes)
    env.reset()
    assert env.action_masks().shape == (3, VOCAB) and not env.action_masks()[:, 3].any()
    env.step(np.array([1, 2, 4]))
    env.action_masks()[:] = True  # a copy: it allows nothing
    with pytest.raises(InvalidAction, match=r"tokens \[3\] in slots \[1\] are not allowed"):
        env.step(np.array([1, 3, 4]))
