"""Methods that learn from some of the policy's own completions, on a table of logits: online DPO, and the best of N."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.table_ppo import Rollout, play
from lit_rlhf.losses import PolicyTokens, ScoredRollout, best_and_worst, best_of_group, policy_gradient_loss
from lit_rlhf.losses.advantages import token_rewards
from lit_rlhf.oracle import Problem, TablePolicy
from lit_rlhf.rollout.keeping import strongest


def selected(rollout: Rollout, estimator: Any, group_size: int, kept: int) -> tuple[Tensor, Tensor]:
    """(groups, kept) numbers of the episodes that an estimator chooses, and (B,) advantages of all."""
    rewards = token_rewards(rollout.scores, torch.zeros(rollout.mask.shape).double(), 0.0, rollout.mask)
    groups = torch.arange(len(rollout.scores)) // group_size
    scored = ScoredRollout(rewards, None, rollout.mask, rollout.scores, rollout.prompt_numbers, groups)
    advantages = estimator(scored).advantages[:, 0]
    return torch.from_numpy(strongest(advantages.view(-1, group_size), kept)), advantages


def learn_online_dpo(
    problem: Problem,
    beta: float,
    loss: Callable[..., Tensor],
    iterations: int = 60,
    rollout_size: int = 4096,
    group_size: int = 2,
    steps: int = 8,
    learning_rate: float = 0.1,
    seed: int = 0,
) -> TablePolicy:
    """Pairs of the policy's own completions, a loss of pairs that is told by how much the rewards differ."""
    rng, shuffle = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    policy = problem.table_policy()
    ref_logprobs = policy(torch.arange(len(policy.logits))).detach()
    env = problem.env(
        rollout_size, reward_mode="deferred", copy=False, autoreset_mode="NextStep", group_size=group_size
    )
    env.reset(seed=seed)
    optimizer = torch.optim.Adam([policy.logits], lr=learning_rate, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        rollout = play(policy, env, rng, rollout_size)
        pairs, advantages = selected(rollout, best_and_worst, group_size, 2)
        margin = advantages[pairs[:, 0]] - advantages[pairs[:, 1]]
        pairs, margin = pairs[margin > 0], margin[margin > 0]
        states = policy.states(rollout.prompt_numbers, rollout.responses)

        def response_logprobs(table: Tensor, rows: Tensor, played: Rollout = rollout, at: Tensor = states) -> Tensor:
            taken = table[at[rows]].gather(-1, played.responses[rows][..., None])[..., 0]
            return (taken * played.mask[rows]).sum(1)

        for rows in torch.randperm(len(pairs), generator=shuffle).chunk(steps):
            chosen, rejected = pairs[rows].T
            logprobs = policy(torch.arange(len(policy.logits)))
            pair = [response_logprobs(t, side) for t in (logprobs, ref_logprobs) for side in (chosen, rejected)]
            optimizer.zero_grad()
            loss(*pair, beta, margin[rows]).mean().backward()
            optimizer.step()
        schedule.step()
    return policy


def learn_best_of(problem: Problem, group_size: int, rollout_size: int = 65_536, steps: int = 300) -> TablePolicy:
    """One iteration of RAFT to its end: SFT on the best of each group that the reference played."""
    rng, policy = np.random.default_rng(0), problem.table_policy()
    env = problem.env(
        rollout_size, reward_mode="deferred", copy=False, autoreset_mode="NextStep", group_size=group_size
    )
    env.reset(seed=0)
    rollout = play(policy, env, rng, rollout_size)
    best, advantages = selected(rollout, best_of_group, group_size, 1)
    rows = best[:, 0]
    states, mask = policy.states(rollout.prompt_numbers, rollout.responses)[rows], rollout.mask[rows]
    actions, weight = rollout.responses[rows][..., None], advantages[rows][:, None].expand(mask.shape)[mask]
    optimizer = torch.optim.Adam([policy.logits], lr=0.1)
    for _ in range(steps):
        logprobs = policy(states).gather(-1, actions)[..., 0][mask]
        optimizer.zero_grad()
        policy_gradient_loss(PolicyTokens(logprobs, logprobs.detach(), weight)).losses.mean().backward()
        optimizer.step()
    return policy
