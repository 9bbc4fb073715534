import copy
import pickle

import gymnasium
import numpy as np
import pytest
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from token_tasks import END, VOCAB, assert_same, only_even_tokens, play, task, weighted_sum

from token_mdp import FinishReason, RewardError, TokenEnv, TokenVectorEnv
from token_mdp.registration import IDS


@pytest.mark.plays("gymnasium", "`check_env`", "single, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_gymnasiums_checker_accepts_every_registered_id(env_id):
    check_env(gymnasium.make(env_id).unwrapped)


@pytest.mark.parametrize(
    ("limit", "tokens", "flags", "reason"),
    [
        ("terminate", (1, 2), (False, False), None),
        ("terminate", (1, END), (True, False), FinishReason.STOP),
        ("terminate", (1, 2, 3, 4), (True, False), FinishReason.LENGTH),
        ("truncate", (1, 2, 3, 4), (False, True), FinishReason.LENGTH),
        ("truncate", (1, 2, 3, END), (True, False), FinishReason.STOP),  # the end token at the limit is an end
    ],
)
def test_an_episode_ends_with_one_flag_and_a_reason(limit, tokens, flags, reason):
    env = TokenEnv(**task(limit=limit))
    env.reset(seed=0)
    _, reward, terminated, truncated, info = play(env, *tokens)
    assert (terminated, truncated) == flags
    assert type(terminated) is bool and type(truncated) is bool and type(reward) is float
    assert info.get("finish_reason") == reason
    assert info.get("response_length") == (len(tokens) if reason else None)


def test_every_stop_token_ends_the_episode():
    env = TokenEnv(**task(stop_token_ids=[3, END]))
    for token in (3, END):
        env.reset()
        assert play(env, token)[2]


def test_without_stop_tokens_only_the_limit_ends_an_episode():
    env = TokenEnv(**task(stop_token_ids=[], max_new_tokens=2))
    env.reset()
    assert not play(env, END)[2]
    assert play(env, END)[2]


def test_the_reward_is_paid_once_at_the_end_for_the_response_with_its_end_token():
    seen = []

    def reward(prompts, responses, answer):
        seen.append((prompts[0].tolist(), responses[0].tolist(), answer))
        return [2.5]

    env = TokenEnv(**task(reward_fn=reward, columns={"answer": ["a", "b", "c"]}))
    env.reset(options={"prompt_index": 1})
    assert play(env, 5)[1] == 0.0
    assert play(env, END)[1] == 2.5
    assert seen == [([2, 3], [5, END], ["b"])]


def test_reward_functions_cannot_reach_the_envs_own_tokens():
    def vandal(prompts, responses):
        prompts[0][:] = 0
        responses[0][:] = 0
        return [0.0]

    env = TokenEnv(**task(reward_fn=vandal))
    for _ in range(2):
        env.reset(options={"prompt_index": 2})
        observation, *_ = play(env, 5, END)
        np.testing.assert_array_equal(observation["input_ids"], [4, 5, 6, 5, END, 0, 0])


def test_infos_hold_numpy_values_only():
    env = TokenEnv(**task(action_mask=True, reward_fn={"sum": weighted_sum}))
    _, info = env.reset()
    infos = [info, play(env, 1)[4], play(env, END)[4]]
    assert {type(value) for info in infos for value in info.values()} == {np.int64, np.int8, np.float64, np.ndarray}


@pytest.mark.plays("gymnasium", "seeding", "single")
def test_equal_seeds_give_equal_episodes():
    rollouts = []
    for _ in range(2):
        env = TokenEnv(**task())
        rollout = [env.reset(seed=11)]
        rng = np.random.default_rng(0)
        for _ in range(30):
            rollout.append(env.step(rng.integers(VOCAB)))
            if rollout[-1][2]:
                rollout.append(env.reset())
        rollouts.append(rollout)
    assert_same(*rollouts)


def test_step_needs_a_running_episode():
    env = TokenEnv(**task())
    with pytest.raises(ResetNeeded, match="call reset\\(\\) first"):
        env.step(1)
    env.reset(options={"prompt_index": 2})
    env.step(END)
    with pytest.raises(ResetNeeded, match="prompt 2 ended with finish reason 'stop'"):
        env.step(1)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))], ids=["copy", "pickle"])
@pytest.mark.parametrize("observation", ["dict", "flat"])
def test_a_copied_or_pickled_env_goes_on_like_the_original_and_by_itself(observation, again):
    arguments = task(observation=observation, process_reward_fn=weighted_sum, action_mask=only_even_tokens)
    for env, act in (
        (TokenEnv(**arguments | {"render_mode": "ansi"}), int),
        (TokenVectorEnv(num_envs=2, reward_mode="deferred", render_mode="ansi", **arguments), lambda t: [t, 4]),
    ):
        env.reset(seed=3)
        env.step(act(2))
        other = again(env)

        def played(env, act=act):
            history = [(*env.step(act(token)), env.render()) for token in (6, 4)]
            history += [env.reset(options={"prompt_index": 2}), env.step(act(2)), env.render(), env.reset()]
            return history + ([e.as_plain() for e in env.pop_episodes()] if hasattr(env, "pop_episodes") else [])

        assert_same(played(other), played(env))


@pytest.mark.parametrize("failing", ["reward_fn", "process_reward_fn"])
def test_a_failed_reward_leaves_an_env_that_wants_a_reset(failing):
    results = [None, [0.0]]
    env = TokenEnv(**task(**{failing: lambda prompts, responses: results.pop(0)}, max_new_tokens=1, render_mode="ansi"))
    env.reset()
    with pytest.raises(RewardError, match=f"{failing} must return"):
        env.step(1)
    with pytest.raises(ResetNeeded):
        env.step(1)
    with pytest.raises(ResetNeeded, match=r"render\(\) without an episode.*also after a reward function"):
        env.render()
    env.reset()
    assert env.step(1)[2]


def test_a_failed_process_reward_in_mid_episode_wants_a_reset_too():
    env = TokenEnv(**task(process_reward_fn=lambda prompts, responses: None))
    env.reset()
    with pytest.raises(RewardError, match="process_reward_fn must return"):
        env.step(1)
    with pytest.raises(ResetNeeded):
        env.step(1)


def test_a_reset_that_fails_leaves_an_env_that_wants_another():
    values = [[1.0], None, [2.0]]
    env = TokenEnv(**task(potential_fn=lambda prompts, responses: values.pop(0)))
    env.reset()
    with pytest.raises(RewardError, match="potential_fn must return"):
        env.reset()
    with pytest.raises(ResetNeeded, match="also after a reward function"):
        env.step(END)
    env.reset(options={"prompt_index": 0})
    assert env.step(END)[1] == 100 + END - 2.0  # Φ of this reset, not of the first


@pytest.mark.parametrize("make", [TokenEnv, lambda **arguments: TokenVectorEnv(num_envs=1, **arguments)])
def test_a_failing_action_mask_is_named_with_its_prompts_and_wants_a_reset(make):
    def allowed(prompts, responses):
        if len(responses[0]) == 1:
            raise KeyError("grammar")
        return np.ones((len(responses), VOCAB), dtype=bool)

    env = make(**task(action_mask=allowed))
    action = env.action_space.sample() * 0 + 1
    env.reset(options={"prompt_index": 2})
    with pytest.raises(ValueError, match=r"action_mask raised KeyError: 'grammar' \(prompt indices \[2\]\)"):
        env.step(action)
    with pytest.raises(ResetNeeded, match="or action_mask has failed"):
        env.step(action)


def test_a_refused_reset_changes_nothing():
    env, other = TokenEnv(**task()), TokenEnv(**task())
    env.reset(seed=1), other.reset(seed=1)
    for options in ({"prompt_index": 99}, {"prompt": 1}):
        with pytest.raises(ValueError, match=r"99|'prompt'"):
            env.reset(seed=9, options=options)
    assert_same(
        [env.step(END)] + [env.reset() for _ in range(6)], [other.step(END)] + [other.reset() for _ in range(6)]
    )


@pytest.mark.parametrize("mode", ["SameStep", "NextStep", "Disabled"])
def test_a_step_before_the_first_reset_is_refused_by_both_envs(mode):
    envs = TokenEnv(**task()), TokenVectorEnv(num_envs=2, autoreset_mode=mode, **task())
    for env, action in zip(envs, (END, np.array([END, END])), strict=True):
        with pytest.raises(ResetNeeded, match=r"step\(\) without an episode: call reset\(\) first"):
            env.step(action)
        env.reset()
        env.step(action)
