"""The problems of the oracle are what their names promise; sizes, ranges and environments are in test_oracle.py."""

import pytest
import torch

from lit_rlhf.oracle import sparse_problem, trap_problem


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
