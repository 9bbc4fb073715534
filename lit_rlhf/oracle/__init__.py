"""Exact answers on token MDPs small enough to enumerate: check any algorithm against theory.

The KL-regularised problem max_π J(π) = E_π[r(x, y)] - β KL(π‖π_ref) has the solution
    π*(y|x) = π_ref(y|x) exp(r(x, y)/β) / Z(x),    J(π*) = β log Z(x),    KL(π‖π*) = (J(π*) - J(π))/β
(Rafailov et al. 2023, Eq. 4 and appendix A.1, https://arxiv.org/abs/2305.18290). Here all completions are listed, so Z
is a sum and each line a number.

    tree = TokenTree(vocab_size=4, stop_ids=[0], max_new_tokens=5)
    oracle = Oracle(tree, prompts, causal_lm(reference), reward_fn, beta=0.1)
    oracle.evaluate(causal_lm(policy)).gap      # (J* - J)/(J* - J_ref): 0 is optimal, 1 is the reference

    GradientJudge(problem, beta=0.1).measure(loss)      # its mean gradient against ∇J: cosine, norm, variance

`small_problems` are MDPs to try an algorithm on, `TablePolicy` a policy that can be any policy on them.

Axes: P prompt tokens, T = max_new_tokens, V vocabulary, K = V - |stop ids| tokens that do not end a completion, C
completions. Level t holds the K^t prefixes of t response tokens that have not ended. A *table* is a list over levels:
of (K^t, V) for something of actions, such as a policy, of (K^t,) for something of states. All is float64 on the CPU;
gradients flow through, so that `backward()` on `objective` gives the exact policy gradient.
"""

from lit_rlhf.oracle.gradients import GradientJudge, GradientReport
from lit_rlhf.oracle.groups import Groups
from lit_rlhf.oracle.methods import OnPolicyMethod
from lit_rlhf.oracle.models import causal_lm
from lit_rlhf.oracle.problems import Problem, random_problem, small_problems, sparse_problem, trap_problem
from lit_rlhf.oracle.solution import (
    Evaluation,
    Oracle,
    RewardFn,
    Values,
    bayes_accuracy,
    divergence_optimum,
    kl_divergence,
    log_partition,
    objective,
    optimal_logprobs,
    optimal_values,
    policy_values,
)
from lit_rlhf.oracle.tables import TablePolicy
from lit_rlhf.oracle.tree import LogprobFn, TokenTree

__all__ = [
    "Evaluation",
    "GradientJudge",
    "GradientReport",
    "Groups",
    "LogprobFn",
    "OnPolicyMethod",
    "Oracle",
    "Problem",
    "RewardFn",
    "TablePolicy",
    "TokenTree",
    "Values",
    "bayes_accuracy",
    "causal_lm",
    "divergence_optimum",
    "kl_divergence",
    "log_partition",
    "objective",
    "optimal_logprobs",
    "optimal_values",
    "policy_values",
    "random_problem",
    "small_problems",
    "sparse_problem",
    "trap_problem",
]
