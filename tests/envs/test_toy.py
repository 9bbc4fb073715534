import gymnasium
import numpy as np
import pytest
from token_tasks import play

from token_mdp import TokenEnv, TokenVectorEnv
from token_mdp.toy import echo_reward, toy_task


def test_a_tabular_agent_solves_the_toy_task():
    """Monte Carlo control with ε-greedy exploration: nothing but the env's arrays and a table of mean returns."""
    env = TokenVectorEnv(num_envs=32, **toy_task())
    rng = np.random.default_rng(0)
    values: dict[bytes, np.ndarray] = {}
    counts: dict[bytes, np.ndarray] = {}
    paths: list[list[tuple[bytes, int]]] = [[] for _ in range(32)]
    observations, _ = env.reset(seed=0)
    for _ in range(2500):
        states = [row.tobytes() for row in observations["input_ids"]]
        greedy = [int(np.argmax(values.get(state, np.ones(1)))) for state in states]
        actions = np.where(rng.random(32) < 0.2, rng.integers(6, size=32), greedy)
        for path, state, action in zip(paths, states, actions, strict=True):
            path.append((state, int(action)))
        observations, rewards, terminated, _, _ = env.step(actions)
        for slot in np.flatnonzero(terminated):
            for state, action in paths[slot]:
                mean, count = values.setdefault(state, np.ones(6)), counts.setdefault(state, np.zeros(6))
                count[action] += 1
                mean[action] += (rewards[slot] - mean[action]) / min(count[action], 20)
            paths[slot] = []

    scores = []
    single = TokenEnv(**toy_task())
    for prompt_index in range(20):
        observation, _ = single.reset(options={"prompt_index": prompt_index})
        terminated = False
        while not terminated:
            best = values.get(observation["input_ids"].tobytes(), np.zeros(6))
            observation, reward, terminated, _, _ = single.step(int(np.argmax(best)))
        scores.append(reward)
    assert np.mean(scores) > 0.9


def test_the_best_return_of_the_toy_task_is_one_for_every_prompt():
    prompts = [np.array(prompt) for prompt in toy_task()["prompts"]]
    answers = [np.append(prompt[:-1], 0) for prompt in prompts]
    np.testing.assert_array_equal(echo_reward(prompts, answers), np.ones(20))


def test_the_toy_task_shows_tokens_of_a_wider_vocabulary():
    env = TokenEnv(**toy_task() | {"vocab_size": 10}, render_mode="ansi")
    env.reset(options={"prompt_index": 6})
    play(env, 1, 8, 0)
    assert "response │ a <8> <end>" in env.render()


def test_toy_reward_is_one_for_the_echo_alone():
    env = gymnasium.make("LitRLHF/Token-v0")
    earned = {}
    for response in [(1, 3, 0), (1, 3), (1, 0), (3, 1, 0), (0,), (1, 3, 1, 0), (1, 3, 1, 1)]:
        env.reset(options={"prompt_index": 6})
        earned[response] = play(env, *response)[1]
    assert earned[1, 3, 0] == 1.0
    assert earned[1, 3] == 0.0  # not over yet
    # 1 of 3 right: a; 1 of 3: the end token in its place; 0 of 3; 2 of 4: a and c
    assert earned[1, 0] == pytest.approx(1 / 3) and earned[3, 1, 0] == pytest.approx(1 / 3)
    assert earned[0,] == 0.0
    assert earned[1, 3, 1, 0] == earned[1, 3, 1, 1] == 0.5
