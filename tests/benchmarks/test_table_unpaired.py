"""What KTO comes to on completions that can be listed; `test_optimality.py` has the optimum that it states."""

import torch

from benchmarks.table_unpaired import desirability, learn_kto
from lit_rlhf.oracle import random_problem


def test_with_contradictory_labels_kto_gives_all_probability_to_what_the_majority_calls_desirable():
    problem = random_problem(3, 3)
    oracle = problem.oracle(0.5)
    desirable = desirability(oracle, threshold=-0.5)
    policy = learn_kto(problem, oracle, desirable, steps=100)
    with torch.no_grad():
        mass = oracle.logprobs(policy.logprob_fn).exp()
    by_majority = desirable > 0.5
    assert 0.2 < oracle.ref_logprobs.exp()[by_majority].sum() < 0.8
    assert mass[by_majority].sum() > 0.99
