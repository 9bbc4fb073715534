"""Learning from the policy's own completions, against what is known of its end."""

import math

import pytest
import torch

from benchmarks.table_online import learn_best_of, learn_online_dpo
from benchmarks.table_preferences import exact_pairs, learn_preferences
from lit_rlhf.losses import dpo_loss, soft_label_dpo_loss
from lit_rlhf.oracle import kl_divergence, random_problem, trap_problem


def test_online_dpo_finds_the_optimum_that_pairs_without_the_best_response_hide():
    problem, beta = trap_problem(), 0.1
    oracle = problem.oracle(beta)
    online = oracle.evaluate(learn_online_dpo(problem, beta, soft_label_dpo_loss, iterations=30).logprob_fn)
    assert online.gap <= 0.005
    assert online.kl_to_optimum <= 0.01

    pairs, best = exact_pairs(oracle, per_completion=16), oracle.rewards[0].argmax()
    seen = (pairs.first != best) & (pairs.second != best)
    weight = pairs.weight * seen / (pairs.weight * seen).sum()
    offline = oracle.evaluate(learn_preferences(problem, oracle, dpo_loss, pairs._replace(weight=weight)).logprob_fn)
    assert offline.gap > 0.1
    assert oracle.optimal_logprobs[0, best].exp() > 0.2  # what was hidden matters


@pytest.mark.parametrize("N", [2, 4])
def test_an_iteration_of_raft_ends_at_the_best_of_n(N):
    """By enumeration: best of N is y with probability F(y)^N - F(y-)^N, F the distribution of rewards under π_ref."""
    problem = random_problem(3, 3)
    oracle = problem.oracle(0.1)
    ref, rewards = oracle.ref_logprobs[0], oracle.rewards[0]
    order = rewards.argsort()
    bounds = torch.cat([torch.zeros(1, dtype=torch.float64), ref.exp()[order].cumsum(0)])
    best_of = torch.empty_like(ref)
    best_of[order] = (bounds[1:] ** N - bounds[:-1] ** N).log()

    learnt = oracle.logprobs(learn_best_of(problem, N, rollout_size=8192, steps=60).logprob_fn)[0]
    assert kl_divergence(best_of, learnt).item() < 0.01
    assert (learnt.exp() @ rewards).item() == pytest.approx((best_of.exp() @ rewards).item(), abs=0.02)
    assert (learnt.exp() @ rewards) > (ref.exp() @ rewards) + 0.1
    # log N - (N - 1)/N is that of rewards that never tie and responses without number; with some it is a bound.
    assert kl_divergence(best_of, ref).item() <= math.log(N) - (N - 1) / N
