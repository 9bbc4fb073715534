"""Methods on policy without a critic, on a table of logits: the project's estimators, losses and environment alone."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from benchmarks.table_ppo import Rollout, play
from lit_rlhf.algorithms.kl_control import KLPenalty
from lit_rlhf.algorithms.settings import LossAverage
from lit_rlhf.losses import (
    Advantages,
    PolicyLoss,
    PolicyTokens,
    ScoredRollout,
    cispo_policy_loss,
    dr_grpo,
    grpo,
    gspo_policy_loss,
    policy_gradient_loss,
    ppo_policy_loss,
    reinforce,
    reinforce_plus_plus,
    remax,
    rloo,
)
from lit_rlhf.losses.advantages import masked_moments, token_rewards, whiten
from lit_rlhf.losses.kl import k1
from lit_rlhf.oracle import Oracle, Problem, TablePolicy

GROUP_SIZE = 8
IN_REWARD, WHOLE_IN_LOSS = KLPenalty(), KLPenalty("loss", "k2_sequence")


class Member(NamedTuple):
    """A method: its estimator of advantages and its loss, and what their optimum is."""

    estimator: Callable[[ScoredRollout], Advantages]
    loss: Callable[[PolicyTokens], PolicyLoss]
    whiten: bool = False
    average: LossAverage = "tokens"
    kl_penalty: KLPenalty = IN_REWARD
    passes: int = 8  # over a rollout; one where nothing holds the policy near the one that was sampled from
    iterations: int | None = None  # where others than most take
    beta_of_optimum: float = 1.0  # in the optimum of E[r] - β KL, times the β that is charged

    def oracle(self, problem: Problem, beta: float) -> Oracle:
        """The problem whose optimum the method has at this β."""
        return problem.oracle(beta * self.beta_of_optimum)


FAMILY = {
    "reinforce": Member(reinforce, policy_gradient_loss, passes=1),
    "rloo": Member(rloo, policy_gradient_loss, passes=1),
    "remax": Member(remax, policy_gradient_loss, passes=1, iterations=150),  # of more variance than a mean's
    "grpo": Member(grpo, ppo_policy_loss),
    "dr_grpo": Member(dr_grpo, ppo_policy_loss, average="max_new_tokens"),
    "reinforce_plus_plus": Member(reinforce_plus_plus, ppo_policy_loss, whiten=True),
    "rloo_clip_higher": Member(rloo, partial(ppo_policy_loss, clip_range_high=0.28), whiten=True),
    "rloo_gspo": Member(rloo, partial(gspo_policy_loss, clip_range=0.1, clip_range_high=0.1)),
    "rloo_cispo": Member(rloo, cispo_policy_loss, passes=1),
    # The penalty in the loss, of whole responses: Dr. GRPO's advantages are (G - 1)/G of the unbiased ones.
    # A loss that knows the ratio, as the penalty does: else steps on one rollout weigh the two differently.
    "rloo_kl_in_loss": Member(rloo, cispo_policy_loss, kl_penalty=WHOLE_IN_LOSS, passes=1),
    "dr_grpo_kl_in_loss": Member(
        dr_grpo,
        cispo_policy_loss,
        kl_penalty=WHOLE_IN_LOSS,
        passes=1,
        beta_of_optimum=GROUP_SIZE / (GROUP_SIZE - 1),
    ),
}


def learn_member(
    problem: Problem,
    beta: float,
    member: Member,
    iterations: int | None = None,
    rollout_size: int = 16_384,
    learning_rate: float | None = None,
    seed: int = 0,
) -> TablePolicy:
    """A method on tables, β from the first step; small β, and one pass over a rollout, take more of them.

    As in `learn_ppo`, large rollouts count: what one has not shown is forgotten on its evidence.
    """
    once = member.passes == 1
    num_minibatches = 16 if once else 8
    if iterations is None:
        iterations = member.iterations or (40 if not once else 60 if beta >= 0.1 else 200)
    if learning_rate is None:
        learning_rate = min(0.02 / beta, 0.05)  # as PPO's
    rng, shuffle = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    policy = problem.table_policy()
    ref_logprobs = policy(torch.arange(len(policy.logits))).detach()
    env = problem.env(
        rollout_size, reward_mode="deferred", copy=False, autoreset_mode="NextStep", group_size=GROUP_SIZE
    )
    env.reset(seed=seed)
    optimizer = torch.optim.Adam([policy.logits], lr=learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    earned: list[Tensor] = []
    for _ in range(iterations):
        rollout = play(policy, env, rng, rollout_size)
        states, mask = policy.states(rollout.prompt_numbers, rollout.responses), rollout.mask
        actions, lengths = rollout.responses[..., None], mask.sum(1)
        with torch.no_grad():
            old_logprobs = policy(states).gather(-1, actions)[..., 0]
            ref = ref_logprobs[states].gather(-1, actions)[..., 0]
            in_reward = beta if member.kl_penalty.place == "reward" else 0.0
            rewards = token_rewards(rollout.scores, k1(old_logprobs, ref), in_reward, mask)
            earned.append(rewards.sum(1).mean())
            scored = ScoredRollout(
                rewards,
                None,
                mask,
                rollout.scores,
                rollout.prompt_numbers,
                torch.arange(rollout_size) // GROUP_SIZE,
                torch.stack(earned).mean(),
                greedy_scores(problem, policy, rollout) if member.estimator is remax else None,
            )
            advantages = member.estimator(scored).advantages
            if member.whiten:
                advantages = whiten(advantages, mask, masked_moments(advantages, mask))
        weights = {
            "tokens": torch.ones_like(rewards),
            "responses": (lengths.double().mean() / lengths)[:, None].expand_as(rewards),
            "max_new_tokens": torch.full_like(rewards, lengths.double().mean() / mask.shape[1]),
        }[member.average]
        for _ in range(member.passes):
            order = torch.randperm(rollout_size, generator=shuffle)
            for rows in order.chunk(num_minibatches):
                real = mask[rows]
                of_real = (states, actions[..., 0], old_logprobs, ref, advantages, weights)
                state, action, old, reference, advantage, weight = (x[rows][real] for x in of_real)
                ids = torch.arange(len(rows))[:, None].expand_as(real)[real]
                logprobs = policy(state).gather(-1, action[:, None])[:, 0]
                losses = member.loss(PolicyTokens(logprobs, old, advantage, ids)).losses
                if member.kl_penalty.place == "loss":
                    losses = losses + beta * member.kl_penalty.loss(logprobs, old, reference, ids)
                optimizer.zero_grad()
                (losses * weight).mean().backward()
                optimizer.step()
        schedule.step()
    return policy


def greedy_scores(problem: Problem, policy: TablePolicy, rollout: Rollout) -> Tensor:
    """(B,) what the most likely response to each episode's prompt earns."""
    tree, earned = policy.tree, []
    for prompt in problem.prompts:
        best = tree.most_likely(tree.tabulate(policy.logprob_fn, prompt))
        earned.append(problem.reward_fn(prompt, tree.completions, tree.lengths)[best])
    return torch.stack(earned)[rollout.prompt_numbers]
