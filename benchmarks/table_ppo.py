"""PPO on a table of logits: the project's losses, estimators and environment without a network around them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_rlhf.losses import PolicyTokens, ppo_policy_loss, value_loss
from lit_rlhf.losses.advantages import ScoredRollout, gae, token_rewards, whiten
from lit_rlhf.losses.kl import k1
from lit_rlhf.oracle import Problem, TablePolicy
from token_mdp import TokenVectorEnv


class Rollout(NamedTuple):
    """B episodes as rows of T cells."""

    prompt_numbers: Tensor  # (B,) int64
    responses: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool
    scores: Tensor  # (B,)


def play(policy: TablePolicy, env: TokenVectorEnv, rng: np.random.Generator, num_episodes: int) -> Rollout:
    """Sample episodes from a table in the environment."""
    cumulative = policy.logits.detach().softmax(-1).cumsum(-1).numpy()
    tree, P = policy.tree, env.task.prompts.max_length
    observation: Any
    observation, info = env.reset(options={"max_episodes": num_episodes})
    while info["active"].any():
        responses = torch.from_numpy(observation["input_ids"][:, P:])
        taken = torch.from_numpy(observation["length"][:, 0] - observation["prompt_length"][:, 0])
        states = policy.states(torch.from_numpy(info["prompt_index"]), responses)
        state = states.gather(1, taken.clamp(max=tree.max_new_tokens - 1)[:, None])[:, 0].numpy()
        draws = rng.random(env.num_envs)
        actions = (draws[:, None] > cumulative[state, :-1]).sum(1)
        observation, _, _, _, info = env.step(actions)
    episodes = env.pop_episodes()
    lengths = torch.tensor([len(e.response_ids) for e in episodes])
    mask = torch.arange(tree.max_new_tokens) < lengths[:, None]
    responses = torch.zeros(mask.shape, dtype=torch.int64)
    responses[mask] = torch.from_numpy(np.concatenate([e.response_ids for e in episodes]))
    numbers = torch.tensor([e.prompt_index for e in episodes])
    return Rollout(numbers, responses, mask, torch.tensor([e.reward for e in episodes], dtype=torch.float64))


def learn_ppo(
    problem: Problem,
    beta: float,
    iterations: int = 40,
    rollout_size: int = 16_384,
    learning_rate: float | None = None,
    critic_learning_rate: float = 0.03,
    gae_lambda: float = 0.95,
    ppo_epochs: int = 8,
    num_minibatches: int = 8,
    clip_range: float = 0.2,
    critic_warmup: int = 2,
    seed: int = 0,
) -> TablePolicy:
    """Plain PPO on tables, β from the first step: KL in the reward, GAE, whitened advantages, clipped ratios.

    Few large rollouts rather than many small ones: what a rollout has not shown is forgotten on its evidence, and at a
    small β the policy then takes long to find it again.
    """
    if learning_rate is None:
        learning_rate = min(0.02 / beta, 0.05)  # logits have to move by as much as r/β, and no more than that
    rng = np.random.default_rng(seed)
    shuffle = torch.Generator().manual_seed(seed)
    policy = problem.table_policy()
    ref_logprobs = policy(torch.arange(len(policy.logits))).detach()
    critic = torch.zeros(len(policy.logits), dtype=torch.float64, requires_grad=True)
    env = problem.env(rollout_size, reward_mode="deferred", copy=False, autoreset_mode="NextStep")
    env.reset(seed=seed)
    groups = [{"params": [policy.logits], "lr": learning_rate}, {"params": [critic], "lr": critic_learning_rate}]
    optimizer = torch.optim.Adam(groups, eps=1e-5)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for iteration in range(iterations):
        rollout = play(policy, env, rng, rollout_size)
        states = policy.states(rollout.prompt_numbers, rollout.responses)
        mask, actions = rollout.mask, rollout.responses[..., None]
        with torch.no_grad():
            old_logprobs = policy(states).gather(-1, actions)[..., 0]
            kl = k1(old_logprobs, ref_logprobs[states].gather(-1, actions)[..., 0])
            values = critic[states]
            rewards = token_rewards(rollout.scores, kl, beta, mask)
            advantages, returns = gae(ScoredRollout(rewards, values, mask), gamma=1.0, gae_lambda=gae_lambda)
            advantages = whiten(advantages, mask)
        tokens = [x[mask] for x in (states, rollout.responses, old_logprobs, advantages, values, returns)]
        for _ in range(ppo_epochs):
            for rows in torch.randperm(len(tokens[0]), generator=shuffle).chunk(num_minibatches):
                state, action, old, advantage, old_value, target = (x[rows] for x in tokens)
                logprobs = policy(state).gather(-1, action[:, None])[:, 0]
                loss = value_loss(critic[state], old_value, target, None).mean()
                if iteration >= critic_warmup:
                    loss = loss + ppo_policy_loss(PolicyTokens(logprobs, old, advantage), clip_range).losses.mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        schedule.step()
    return policy
