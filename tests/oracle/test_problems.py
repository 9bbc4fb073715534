"""The problems of the oracle are what their names promise."""

import numpy as np
import pytest
import torch

from lit_rlhf.oracle import policy_values, small_problems, sparse_problem, trap_problem


def rewards_of(problem, prompt_ids):
    return problem.reward_fn(prompt_ids, problem.tree.completions, problem.tree.lengths)


@pytest.mark.parametrize("num_right", [1, 3])
def test_in_the_sparse_problem_few_completions_earn_and_the_reference_seldom_writes_them(num_right):
    problem = sparse_problem(num_right=num_right)
    assert sorted(rewards_of(problem, problem.prompts[0]).unique().tolist()) == [0, 1]
    assert rewards_of(problem, problem.prompts[0]).sum() == num_right
    assert problem.oracle(0.1).reference_objective < 0.02


def test_the_greedy_start_of_the_trap_is_wrong_and_the_optimum_starts_right():
    problem = trap_problem()
    tree, rewards = problem.tree, rewards_of(problem, problem.prompts[0])
    first, reference = tree.completions[:, 0], problem.oracle(1.0).ref_logprobs[0].exp()
    means = [(reference * rewards)[first == token].sum() / reference[first == token].sum() for token in range(3)]
    assert torch.stack(means).argmax() == 1  # what a greedy first step would choose
    assert first[rewards.argmax()] == 2
    optimum = problem.oracle(0.05).optimal_logprobs[0].exp()
    assert optimum[first == 2].sum() > optimum[first == 1].sum()


@pytest.mark.parametrize("problem", small_problems(), ids=lambda problem: problem.name)
class TestProblems:
    def test_the_environment_pays_what_the_oracle_knows(self, problem):
        env = problem.env(4, reward_mode="deferred", copy=False)
        rng = np.random.default_rng(0)
        _, info = env.reset(seed=0, options={"max_episodes": 20})
        while info["active"].any():
            *_, info = env.step(rng.integers(0, problem.tree.vocab_size, 4))
        rewards = problem.oracle(0.1).rewards
        for episode in env.pop_episodes():
            row = problem.tree.index(episode.response_ids)
            assert episode.reward == rewards[episode.prompt_index, row].item()

    def test_rewards_lie_between_0_and_1_and_differ(self, problem):
        rewards = problem.oracle(0.1).rewards
        assert rewards.min() >= 0 and rewards.max() <= 1 and rewards.std() > 0.05

    def test_its_size_is_within_the_promise(self, problem):
        assert 3 <= problem.tree.vocab_size <= 8 and 3 <= problem.tree.max_new_tokens <= 8


def test_the_trap_pays_less_under_the_reference_where_the_best_completion_begins():
    problem = trap_problem()
    oracle = problem.oracle(0.1)
    first = policy_values(problem.tree, oracle.ref_tables[0], oracle.ref_tables[0], oracle.rewards[0], 0.0)
    after_1, after_2 = first.action_values[0][0, 1:].tolist()
    best = problem.tree.completions[oracle.rewards[0].argmax()]
    assert best.tolist() == [2] * 6
    assert after_2 < after_1 - 0.3  # greedy in the reference's values takes token 1
