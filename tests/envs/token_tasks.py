"""Small tasks and comparisons that the tests of the token environment share."""

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np

import token_mdp  # noqa: F401 (registers the ids)
from token_mdp import TokenVectorEnv

VOCAB = 8
END = 7
NEWLINE = 6


def weighted_sum(prompts, responses):
    """A reward that tells apart any two prompts and responses that these tests play."""
    return [
        100.0 * prompt.sum() + (response * np.arange(1, len(response) + 1)).sum()
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def task(**changes: Any) -> dict[str, Any]:
    """Arguments of a task with three prompts of one, two and three tokens; the end token is 7."""
    return {
        "prompts": [[1], [2, 3], [4, 5, 6]],
        "vocab_size": VOCAB,
        "stop_token_ids": [END],
        "max_new_tokens": 4,
        "reward_fn": weighted_sum,
    } | changes


def assert_same(left: Any, right: Any, where: str = "") -> None:
    """Equal values, types, dtypes and shapes, all the way down."""
    assert type(left) is type(right), f"{where}: {type(left)} against {type(right)}"
    if isinstance(left, dict):
        assert left.keys() == right.keys(), f"{where}: {sorted(left)} against {sorted(right)}"
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, tuple | list):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}[{index}]")
    elif isinstance(left, np.ndarray):
        assert left.dtype == right.dtype and left.shape == right.shape, f"{where}: {left!r} against {right!r}"
        if left.dtype == object:
            assert_same(left.tolist(), right.tolist(), where)
        else:
            np.testing.assert_array_equal(left, right, err_msg=where)
    else:
        assert left == right or (left != left and right != right), f"{where}: {left} against {right}"


def toy_score(act: Callable[[Any], Any], env_id: str = "LitRLHF/Token-v0") -> float:
    """Mean reward of a policy (observations -> (B,) tokens) over the toy task's 20 prompts, each exactly once."""
    env = gymnasium.make_vec(env_id, num_envs=20, max_episodes=20, shuffle=False)
    observations, infos = env.reset()
    total = 0.0
    while infos["active"].any():
        observations, rewards, _, _, infos = env.step(np.asarray(act(observations)))
        total += rewards.sum()
    return total / 20


def make(num_envs=3, **changes):
    """A vector env of the task."""
    return TokenVectorEnv(num_envs=num_envs, **task(**changes))


def drain(env, rng, **reset):
    """Play a finite stream with random tokens; the transitions, those of parked slots included."""
    env.reset(**reset)
    transitions = []
    while env.active.any():
        transitions.append(env.step(rng.integers(VOCAB, size=env.num_envs)))
    return transitions


def play(env, *tokens):
    """The last transition of a single env that takes these tokens."""
    for token in tokens:
        transition = env.step(token)
    return transition


def only_even_tokens(prompts, responses):
    return [[token % 2 == 0 for token in range(VOCAB)] for _ in responses]


def ends_of_all_slots(**changes):
    """One step that ends the episodes of prompts 0, 1 and 2."""
    env = TokenVectorEnv(num_envs=3, **task(shuffle=False, **changes))
    env.reset()
    return env.step(np.full(3, END))


def zero(prompts, responses):
    return np.zeros(len(responses))


def newest_token(prompts, responses):
    """A process reward: the token itself."""
    return [float(response[-1]) for response in responses]
