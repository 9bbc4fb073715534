"""The native vector env against Gymnasium's SyncVectorEnv of single envs: the same in everything that is returned."""

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from token_tasks import assert_same, weighted_sum

from token_mdp import PromptQueue, TokenEnv, TokenVectorEnv

NATIVE_ONLY = ("episode_id", "active")
NATIVE_ONLY_AT_THE_END = ("episode_id", "input_ids", "attention_mask", "length")


class Digits:
    """Token t is the digit t."""

    def decode(self, ids, skip_special_tokens=False):
        return "".join(map(str, ids))


def ids_of(texts):
    """Token ids, from what the functions get with `reward_on` "tokens" or "text"."""
    return [np.array([int(token) for token in text], dtype=np.int64) for text in texts]


def sum_and_answer(prompts, responses, answer=None):
    extra = np.zeros(len(responses)) if answer is None else np.array(answer)
    return np.add(weighted_sum(ids_of(prompts), ids_of(responses)), extra)


def length_reward(prompts, responses, **columns):
    return [float(len(response)) for response in responses]


def odd_newest(prompts, responses, **columns):
    return [0.25 * (response[-1] % 2) for response in ids_of(responses)]


def half_length(prompts, responses, **columns):
    return [0.5 * len(response) + prompt[0] for prompt, response in zip(ids_of(prompts), responses, strict=True)]


def no_repeats(vocab_size):
    def allowed(prompts, responses, **columns):
        table = np.ones((len(responses), vocab_size), dtype=bool)
        for row, response in enumerate(responses):
            table[row, ids_of([response])[0][-1:]] = False
        return table

    return allowed


@st.composite
def tasks(draw):
    vocab_size = draw(st.integers(2, 6))
    token = st.integers(0, vocab_size - 1)
    arguments = {
        "prompts": draw(st.lists(st.lists(token, min_size=1, max_size=4), min_size=1, max_size=5)),
        "vocab_size": vocab_size,
        "stop_token_ids": draw(st.lists(token, max_size=2)),
        "max_new_tokens": draw(st.integers(1, 5)),
        "max_prompt_length": draw(st.none() | st.integers(1, 5)),
        "reward_fn": draw(st.sampled_from([sum_and_answer, {"sum": sum_and_answer, "length": (length_reward, -0.5)}])),
        "process_reward_fn": draw(st.sampled_from([None, odd_newest])),
        "potential_fn": draw(st.sampled_from([None, half_length])),
        "limit": draw(st.sampled_from(["terminate", "truncate"])),
        "action_mask": draw(st.sampled_from([None, True, no_repeats(vocab_size)])),
        "observation": draw(st.sampled_from(["dict", "flat"])),
        "reward_on": draw(st.sampled_from(["tokens", "text"])),
        "tokenizer": Digits(),
    }
    if draw(st.booleans()):
        arguments["columns"] = {"answer": [1000.0 * row for row in range(len(arguments["prompts"]))]}
    if arguments["process_reward_fn"] is not None:
        arguments["step_boundary_ids"] = draw(st.none() | st.lists(token, max_size=2))
    if arguments["potential_fn"] is not None:
        arguments["gamma"] = draw(st.sampled_from([0.5, 1.0]))
    return arguments


def without_native_only(infos):
    infos = {key: value for key, value in infos.items() if key.removeprefix("_") not in NATIVE_ONLY}
    if "final_info" in infos:
        infos["final_info"] = {
            key: value
            for key, value in infos["final_info"].items()
            if key.removeprefix("_") not in NATIVE_ONLY_AT_THE_END
        }
    return infos


@pytest.mark.plays(
    "gymnasium", "native equals `SyncVectorEnv`, property-based", "NextStep, SameStep, Disabled; Dict and flat"
)
@pytest.mark.parametrize("mode", list(AutoresetMode))
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(arguments=tasks(), num_envs=st.integers(1, 4), group_size=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_native_vector_env_equals_sync_vector_env_of_single_envs(mode, arguments, num_envs, group_size, seed):
    native = TokenVectorEnv(num_envs=num_envs, autoreset_mode=mode, group_size=group_size, **arguments)
    queue = PromptQueue(len(arguments["prompts"]), group_size=group_size)
    sync = SyncVectorEnv([lambda: TokenEnv(prompt_queue=queue, **arguments)] * num_envs, autoreset_mode=mode)
    assert native.observation_space == sync.observation_space
    assert native.action_space == sync.action_space
    assert native.metadata == sync.metadata

    for seeds in (seed, [seed] * num_envs, [*range(seed, seed + num_envs)]):  # again, from the middle of a pass
        observations, infos = native.reset(seed=seeds)
        expected_observations, expected_infos = sync.reset(seed=seeds)  # the first env's seed alone shuffles for all
        assert_same(observations, expected_observations)
        assert_same(without_native_only(infos), expected_infos)

    rng = np.random.default_rng(seed)
    for _ in range(20):
        masks = native.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        *transition, infos = native.step(actions)
        *expected, expected_infos = sync.step(actions)
        assert_same(transition, expected)
        assert_same(without_native_only(infos), expected_infos)

        done = transition[2] | transition[3]
        if mode == AutoresetMode.DISABLED and done.any():
            options = {"reset_mask": done}
            if rng.random() < 0.5 and group_size == 1:
                options["prompt_index"] = int(rng.integers(len(arguments["prompts"])))
            observations, infos = native.reset(options=dict(options))
            expected_observations, expected_infos = sync.reset(options=dict(options))
            for key in {"action_mask", "_action_mask"} & infos.keys():  # native has those of the other slots, too
                infos[key][~done] = 0
            assert_same(observations, expected_observations)
            assert_same(without_native_only(infos), expected_infos)
