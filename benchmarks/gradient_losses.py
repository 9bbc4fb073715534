"""What `benchmarks/gradients.py` judges: each way to charge the KL, each method with its ways, DPO.

Formulas that no option of ours has are written out here: what others do, or might.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lit_rlhf
from lit_rlhf import KLPenalty
from lit_rlhf.losses import (
    PolicyLoss,
    PolicyTokens,
    cispo_policy_loss,
    dpo_loss,
    dr_grpo,
    gae,
    grpo,
    gspo_policy_loss,
    policy_gradient_loss,
    reinforce,
    rloo,
)
from lit_rlhf.losses.advantages import Advantages, ScoredRollout
from lit_rlhf.losses.kl import ESTIMATORS, sequence_sums
from lit_rlhf.oracle import GradientJudge, GradientReport, Groups, OnPolicyMethod, Problem, random_problem

Loss = OnPolicyMethod | Callable[[Groups], Tensor]
UNCLIPPED = 1e9
no_baseline = partial(reinforce, baseline="none")


def two_prompts() -> Problem:
    """15 responses of up to 3 tokens to each of two prompts: one has graded scores, one is right or wrong."""
    problem = random_problem(3, 3, num_prompts=2)

    def reward_fn(prompt_ids: Tensor, completions: Tensor, lengths: Tensor) -> Tensor:
        rewards = problem.reward_fn(prompt_ids, completions, lengths)
        return rewards if prompt_ids[1] == 0 else (rewards > 0.7).double()

    return problem._replace(name="two prompts", reward_fn=reward_fn)


def without_scores(problem: Problem) -> Problem:
    """The same where every response earns 0: the KL alone is left."""
    return problem._replace(reward_fn=lambda prompt_ids, completions, lengths: torch.zeros(len(lengths)))


class KLOption(NamedTuple):
    """A way to charge KL(π‖π_ref)."""

    place: str  # reward or loss
    estimator: str
    level: str  # of the estimator: token or sequence
    ratio: str  # π/π_old that it is multiplied by: none, of the token, geometric mean, of the sequence
    loss: Loss
    ours: str = ""  # what asks for it in a YAML


RATIOS = ("none", "token", "geometric mean", "sequence")


def ratio_of(name: str, logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """(B, T) or (B, 1) importance ratio π/π_old by its name."""
    drift = logprobs - old_logprobs
    whole = drift.sum(1, keepdim=True)
    means = {"token": drift, "geometric mean": whole / response_mask.sum(1, keepdim=True), "sequence": whole}
    return means.get(name, torch.zeros_like(whole)).exp()


def kl_in_loss(estimator: str, level: str, ratio: str, group: Groups) -> Tensor:
    """Mean over responses of ratio × estimate, differentiated as it stands."""
    logprobs, ref_logprobs = group.logprobs, group.ref_logprobs
    if level == "sequence":
        logprobs, ref_logprobs = (rows.sum(1, keepdim=True) for rows in (logprobs, ref_logprobs))
    estimates = ESTIMATORS[estimator](logprobs, ref_logprobs)  # 0 past an end
    return (ratio_of(ratio, group.logprobs, group.old_logprobs, group.response_mask) * estimates).sum(1).mean()


def sequence_ratio_loss(tokens: PolicyTokens) -> PolicyLoss:
    """-ρ A log π, ρ = π(y)/π_old(y) of the whole response without gradient: exact, and of the most variance."""
    assert tokens.sequence_ids is not None
    ratio = sequence_sums(tokens.logprobs - tokens.old_logprobs, tokens.sequence_ids).exp().detach()
    return PolicyLoss(-ratio * tokens.advantages * tokens.logprobs, {})


RATIO_LOSSES: dict[str, Callable[[PolicyTokens], PolicyLoss]] = {
    "none": policy_gradient_loss,
    "token": partial(cispo_policy_loss, clip_range_high=UNCLIPPED),
    "geometric mean": partial(gspo_policy_loss, clip_range=UNCLIPPED, clip_range_high=UNCLIPPED),
    "sequence": sequence_ratio_loss,
}


def kl_options() -> Iterator[KLOption]:
    """Every way; ours are named as a YAML names them."""
    for estimator in ESTIMATORS:
        for ratio in RATIOS if estimator == "k1" else ("token",):
            loss = OnPolicyMethod(no_baseline, RATIO_LOSSES[ratio], KLPenalty("reward", estimator))
            ours = "" if ratio == "sequence" else f"{{place: reward, estimator: {estimator}}}"
            yield KLOption("reward", estimator, "token", ratio, loss, ours)
    for level in ("token", "sequence"):
        for estimator in ESTIMATORS:
            for ratio in RATIOS if level == "token" else ("none", "sequence"):
                yield KLOption("loss", estimator, level, ratio, partial(kl_in_loss, estimator, level, ratio))
    for estimator in (*ESTIMATORS, "k2_sequence"):
        loss = OnPolicyMethod(no_baseline, policy_gradient_loss, KLPenalty("loss", estimator))
        level = "sequence" if estimator == "k2_sequence" else "token"
        ours = f"{{place: loss, estimator: {estimator}}}"
        yield KLOption("loss", f"{estimator[:2]}, k2's gradient", level, f"{level}, constant", loss, ours)


GROUP_SIZE = 4
Kind = tuple[type, dict[str, Any]]
METHODS: dict[str, Kind] = {
    "PPO": (lit_rlhf.PPO, {}),
    "REINFORCE": (lit_rlhf.REINFORCE, {}),
    "RLOO": (lit_rlhf.RLOO, {}),
    "GRPO": (lit_rlhf.GRPO, {}),
    "DrGRPO": (lit_rlhf.DrGRPO, {}),
    "REINFORCEPlusPlus": (lit_rlhf.REINFORCEPlusPlus, {}),
    "ReMax": (lit_rlhf.ReMax, {}),
    "GSPO": (lit_rlhf.GRPO, {"loss": gspo_policy_loss}),
    "CISPO": (lit_rlhf.GRPO, {"loss": cispo_policy_loss, "loss_average": "tokens"}),
}
IN_GROUPS = ("RLOO", "GRPO", "DrGRPO", "GSPO", "CISPO")
PENALTIES = {
    "none": None,
    "reward, k1": KLPenalty(),
    "loss, k3": KLPenalty("loss", "k3"),
    "loss, k2_sequence": KLPenalty("loss", "k2_sequence"),
}


def blind_gae(rollout: ScoredRollout) -> Advantages:
    """GAE with λ = 0.95 whose critic has learnt nothing yet."""
    assert rollout.values is not None
    return gae(rollout._replace(values=torch.zeros_like(rollout.values)))


def mean_of_the_group(group: Groups) -> Tensor:
    """-A log π, a mean over the tokens of this group alone: what a micro-batch's own mean comes to."""
    advantages = group.scores - group.scores.mean()
    return -(advantages[:, None] * group.logprobs).sum() / group.response_mask.sum()


# GRPO's two divisions, one by one, without a KL.
NORMALISATIONS: dict[str, Loss] = {
    "neither (RLOO)": OnPolicyMethod(rloo, policy_gradient_loss),
    "neither (Dr. GRPO)": OnPolicyMethod(dr_grpo, policy_gradient_loss),
    "by the standard deviation": OnPolicyMethod(grpo, policy_gradient_loss),
    "by the length": OnPolicyMethod(dr_grpo, policy_gradient_loss, loss_average="responses"),
    "both (GRPO)": OnPolicyMethod(grpo, policy_gradient_loss, loss_average="responses"),
    "by the tokens of each group": mean_of_the_group,
}


def dpo_reports(judge: GradientJudge) -> tuple[GradientReport, GradientReport]:
    """DPO on pairs of π_old, labelled by Bradley-Terry: against the gradient of its own objective, and against ∇J.

    Its own objective is the cross-entropy between the probabilities of the preferences under the reward and under the
    implicit reward, over all pairs: what draws of labels estimate.
    """
    groups, beta = judge.groups(2, ordered=True).with_gradient(), judge.beta
    chosen, rejected = groups.logprobs.sum(1).view(-1, 2).T
    ref_chosen, ref_rejected = groups.ref_logprobs.sum(1).view(-1, 2).T
    losses = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta)
    slopes = torch.autograd.grad(losses.sum(), groups.logprobs)[0]
    first, second = groups.scores.view(-1, 2).T
    labelled = 2 * (first - second).sigmoid()  # times P(first) P(second): of this one drawn, and of this order
    groups = groups._replace(weights=groups.weights * labelled.repeat_interleave(2))

    problem, own = judge.problem, torch.zeros((), dtype=torch.float64)
    for number, prompt in enumerate(problem.prompts):
        tables = [problem.tree.tabulate(policy, prompt) for policy in (judge.policy.logprob_fn, problem.reference)]
        logprobs, ref_logprobs = map(problem.tree.completion_logprobs, tables)
        implicit = beta * (logprobs - ref_logprobs.detach())
        rewards = problem.reward_fn(prompt, problem.tree.completions, problem.tree.lengths)
        drawn = judge.old_logprobs[number].exp()
        wins = (rewards[:, None] - rewards).sigmoid()
        own = own - (2 * drawn[:, None] * drawn * wins * F.softplus(implicit - implicit[:, None])).sum()
    exact = torch.autograd.grad(own / len(problem.prompts), judge.policy.logits)[0].flatten()
    return judge.compare(groups, slopes, exact), judge.compare(groups, slopes)
