"""Process rewards and potential-based shaping."""

from itertools import product

import numpy as np
import pytest
from token_tasks import END, NEWLINE, newest_token, task, zero

from token_mdp import RewardError, TokenEnv, TokenVectorEnv


def play(env, tokens, **reset):
    """Rewards and infos of an episode."""
    env.reset(**reset)
    transitions = [env.step(token) for token in tokens]
    return [transition[1] for transition in transitions], [transition[4] for transition in transitions]


def test_process_rewards_are_paid_for_every_token():
    env = TokenEnv(**task(process_reward_fn=newest_token, reward_fn=lambda p, r: [100.0]))
    rewards, infos = play(env, [3, 5, END])
    assert rewards == [3.0, 5.0, 100.0 + END]
    assert [info["reward/process"] for info in infos] == [3.0, 5.0, END]


def test_process_rewards_at_boundaries_are_paid_where_a_step_closes_and_at_the_end():
    seen = []

    def score(prompts, responses):
        seen.append(responses[0].tolist())
        return [1.0]

    env = TokenEnv(**task(process_reward_fn=score, step_boundary_ids=[NEWLINE], reward_fn=zero))
    rewards, infos = play(env, [3, NEWLINE, 4, END])
    assert rewards == [0.0, 1.0, 0.0, 1.0]
    assert seen == [[3, NEWLINE], [3, NEWLINE, 4, END]]
    assert [info["reward/process"] for info in infos] == [0.0, 1.0, 0.0, 1.0]  # the key is there on every step


def test_functions_for_steps_cannot_reach_the_envs_own_tokens():
    def vandal(prompts, responses):
        for ids in prompts + responses:
            ids[:] = 0
        return np.zeros(len(responses))

    def vandal_mask(prompts, responses):
        vandal(prompts, responses)
        return np.ones((len(responses), 8), dtype=bool)

    arguments = task(process_reward_fn=vandal, potential_fn=vandal, reward_fn=vandal, action_mask=vandal_mask)
    for env in (TokenEnv(**arguments), TokenVectorEnv(num_envs=1, autoreset_mode="NextStep", **arguments)):
        env.reset(options={"prompt_index": 2})
        for token in (5, END):
            observation, *_ = env.step(np.array(token).reshape(env.action_space.shape))
        assert observation["input_ids"].ravel().tolist() == [4, 5, 6, 5, END, 0, 0]


# A task small enough to enumerate: three tokens, of which 0 ends, and at most three of them.
SMALL = {"prompts": [[1]], "vocab_size": 3, "stop_token_ids": [0], "max_new_tokens": 3}
GAMMA = 0.9


def responses_of(task_length=3):
    """Every complete response: up to the first end token, or to the limit."""
    for tokens in product(range(3), repeat=task_length):
        end = tokens.index(0) + 1 if 0 in tokens else task_length
        if all(token == 0 for token in tokens[end:]):  # one representative per response
            yield tokens[:end]


def random_number(response):
    """A reproducible number in 0..1 for every state."""
    return np.random.default_rng([7, len(response), *response]).random()


def outcome(prompts, responses):
    return [random_number(response) for response in responses]


def potential(prompts, responses):
    return [5 * random_number([9, *response]) for response in responses]


def optimal_actions(env):
    """The best tokens in each state of the small task, by trying every response in the env."""
    best_return: dict[tuple[int, ...], dict[int, float]] = {}
    for response in responses_of():
        rewards, _ = play(env, response)
        for t in range(len(response)):
            to_go = sum(GAMMA**k * reward for k, reward in enumerate(rewards[t:]))
            actions = best_return.setdefault(response[:t], {})
            actions[response[t]] = max(to_go, actions.get(response[t], -np.inf))
    return {state: max(actions, key=actions.get) for state, actions in best_return.items()}, best_return


def test_shaping_leaves_the_optimal_policy_unchanged():
    plain, plain_values = optimal_actions(TokenEnv(**SMALL, reward_fn=outcome))
    shaped, shaped_values = optimal_actions(TokenEnv(**SMALL, reward_fn=outcome, potential_fn=potential, gamma=GAMMA))
    assert len(plain) == 7  # (), 1, 2, 11, 12, 21, 22
    assert shaped == plain
    # Ng et al. 1999, Corollary 2: Q'(s, a) = Q(s, a) - Φ(s)
    for state, actions in plain_values.items():
        for action, value in actions.items():
            assert shaped_values[state][action] == pytest.approx(value - potential([], [state])[0])


def test_shaping_with_the_potential_kept_at_the_end_would_change_the_optimum():
    # The counterpart to the test above: what makes it hold is Φ = 0 in terminal states.
    class KeptAtTheEnd:
        def __call__(self, prompts, responses):
            return np.add(outcome(prompts, responses), GAMMA * np.array(potential(prompts, responses)))

    plain, _ = optimal_actions(TokenEnv(**SMALL, reward_fn=outcome))
    wrong, _ = optimal_actions(TokenEnv(**SMALL, reward_fn=KeptAtTheEnd(), potential_fn=potential, gamma=GAMMA))
    assert wrong != plain


def test_each_step_pays_the_difference_of_potentials():
    env = TokenEnv(**task(reward_fn=zero, potential_fn=lambda p, r: [10.0 + len(r[0])], gamma=0.5))
    rewards, infos = play(env, [1, 1, END])
    # 0.5·11 - 10, 0.5·12 - 11, 0.5·0 - 12
    assert rewards == [-4.5, -5.0, -12.0]
    assert [info["reward/shaping"] for info in infos] == rewards


def test_sums_of_step_rewards_that_overflow_are_refused():
    def huge(sign):
        return lambda prompts, responses: [sign * 1.5e308] * len(responses)

    shaped = task(potential_fn=lambda p, r: [1.5e308 if len(r[0]) else -1.5e308])
    at_the_end = task(process_reward_fn=huge(1), reward_fn=huge(1))
    for arguments, message in (
        (shaped, r"shaping by potential_fn has 1 values .*: \{2: inf\}"),
        (task(process_reward_fn=huge(-1), potential_fn=huge(1)), r"sum of process_reward_fn and shaping has 1 values"),
        (at_the_end, r"sum of the last step's reward and reward_fn has 1 values .*: \{2: inf\}"),
    ):
        for env, act in (
            (TokenEnv(**arguments), int),
            (TokenVectorEnv(num_envs=1, **arguments), lambda token: [token]),
        ):
            env.reset(options={"prompt_index": 2})
            with pytest.raises(RewardError, match=message):
                env.step(act(END if arguments is not shaped else 1))


def test_a_truncated_state_keeps_its_potential():
    env = TokenEnv(**task(reward_fn=zero, potential_fn=lambda p, r: [float(len(r[0]))], limit="truncate"))
    rewards, _ = play(env, [1, 1, 1, 1])
    assert rewards == [1.0, 1.0, 1.0, 1.0]  # the agent bootstraps from V(s_T), which has Φ(s_T) taken off


def test_process_rewards_shaping_and_outcome_add_up():
    env = TokenEnv(
        **task(
            reward_fn={"end": (lambda p, r: [10.0], 2.0)},
            process_reward_fn=newest_token,
            potential_fn=lambda p, r: [float(len(r[0]))],
        )
    )
    rewards, infos = play(env, [3, END])
    assert rewards == [3.0 + 1.0, END - 1.0 + 20.0]
    assert (infos[1]["reward/process"], infos[1]["reward/shaping"], infos[1]["reward/end"]) == (END, -1.0, 10.0)
