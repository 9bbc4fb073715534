"""Who gets the credit on a long horizon: samples until 90 % of the optimum, for four ways to pay and to learn.

    python benchmarks/credit_assignment.py [--output docs/data/credit_assignment.jsonl] [--lengths '[64]']

The task: T steps, V tokens, one of them right at each step; the return is the share of right tokens. The policy is a
table (T, V), the environment is `token_mdp`, and the same return is paid in two ways:

- process reward: 1/T with each right token; sparse reward: all of it with the last token.
- REINFORCE learns from the return of the whole sequence, less the mean of the other sequences of the batch, and gives
  every token that same advantage; so the noise of T - 1 other tokens hides the one token's part. Actor-critic learns
  from GAE with a critic per step, linear in the right tokens so far, which can tell when the return changed.

One JSON line per (method, T, seed): `samples` is how many episodes it took, `curve` the exact mean return on the way.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lit_rlhf.cli.parser import command
from lit_rlhf.errors import require
from lit_rlhf.files import make_room, write_lines
from lit_rlhf.losses import PolicyTokens, ppo_policy_loss, value_loss
from lit_rlhf.losses.advantages import ScoredRollout, gae, whiten
from token_mdp import TokenVectorEnv

VOCABULARY = 4
METHODS = {  # name -> (process reward, critic, λ)
    "process reward, GAE λ = 0.95": (True, True, 0.95),
    "sparse reward, GAE λ = 0.95": (False, True, 0.95),
    "process reward, no critic, λ = 1": (True, False, 1.0),
    "sparse reward, REINFORCE": (False, False, 1.0),
}


def make_env(right: np.ndarray, num_envs: int, process: bool) -> TokenVectorEnv:
    """The task; `right` (T,) holds the right token of each step."""
    T = len(right)

    def share(prompts: Any, responses: Any) -> list[float]:
        return [float((response == right[: len(response)]).mean()) for response in responses]

    def each(prompts: Any, responses: Any) -> list[float]:
        return [float(response[-1] == right[len(response) - 1]) / T for response in responses]

    def nothing(prompts: Any, responses: Any) -> list[float]:
        return [0.0] * len(responses)

    return TokenVectorEnv(
        prompts=[[0]],
        num_envs=num_envs,
        vocab_size=VOCABULARY,
        stop_token_ids=(),
        max_new_tokens=T,
        reward_fn=nothing if process else share,
        process_reward_fn=each if process else None,
        copy=False,
    )


def play(logits: torch.Tensor, env: TokenVectorEnv, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One episode per slot: tokens and rewards, (B, T) each."""
    T, cumulative = len(logits), logits.detach().softmax(-1).cumsum(-1).numpy()
    env.reset()
    tokens, rewards = np.zeros((2, env.num_envs, T))
    for t in range(T):
        actions = (rng.random(env.num_envs)[:, None] > cumulative[t, :-1]).sum(1)
        _, rewards[:, t], *_ = env.step(actions)
        tokens[:, t] = actions
    return torch.from_numpy(tokens).long(), torch.from_numpy(rewards)


def learn(
    length: int,
    process: bool,
    with_critic: bool,
    gae_lambda: float,
    seed: int,
    batch_size: int = 16,
    learning_rate: float = 0.1,
    critic_epochs: int = 10,
    max_samples: int = 40_000,
    target: float = 0.9,
) -> tuple[int | None, list[tuple[int, float]]]:
    """Policy gradient until the exact mean return reaches the target: episodes taken, and the way there."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, VOCABULARY, length)
    env = make_env(right, batch_size, process)
    env.reset(seed=seed)
    steps, index = torch.arange(length), torch.from_numpy(right)
    logits = torch.zeros(length, VOCABULARY, dtype=torch.float64, requires_grad=True)
    critic = torch.zeros(length, 2, dtype=torch.float64, requires_grad=True)  # V = level + slope · share right so far
    optimizer = torch.optim.Adam([logits], lr=learning_rate)
    critic_optimizer = torch.optim.Adam([critic], lr=0.05)
    mask = torch.ones(batch_size, length, dtype=torch.bool)
    curve: list[tuple[int, float]] = []
    for samples in range(0, max_samples + 1, batch_size):
        attained = logits.detach().softmax(-1)[steps, index].mean().item()
        curve.append((samples, attained))
        if attained >= target:
            return samples, curve
        tokens, rewards = play(logits, env, rng)
        so_far = (tokens == index).long().cumsum(1).roll(1, dims=1)
        so_far[:, 0] = 0
        if with_critic:
            share = so_far / length
            values = (critic[:, 0] + critic[:, 1] * share).detach()
            advantages, returns = gae(ScoredRollout(rewards, values, mask), gamma=1.0, gae_lambda=gae_lambda)
            for _ in range(critic_epochs):
                critic_optimizer.zero_grad()
                value_loss(critic[:, 0] + critic[:, 1] * share, values, returns, None).mean().backward()
                critic_optimizer.step()
        else:
            # A baseline per step over the others of the batch; with a sparse reward it is leave-one-out REINFORCE.
            returns = rewards.flip(1).cumsum(1).flip(1)
            advantages = returns - (returns.sum(0) - returns) / (batch_size - 1)
        logprobs = torch.log_softmax(logits, -1)[steps].expand(batch_size, -1, -1).gather(-1, tokens[..., None])[..., 0]
        loss = ppo_policy_loss(PolicyTokens(logprobs, logprobs.detach(), whiten(advantages, mask)), 0.2).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return None, curve


def main(
    output: str | None = None, lengths: tuple[int, ...] = (64, 256), seeds: int = 3, max_samples: int = 40_000
) -> None:
    """Measure and print.

    Args:
        output: file for the JSON lines as well.
        lengths: horizons T.
        seeds: runs of each.
        max_samples: give up after so many episodes.
    """
    require(len(lengths) > 0 and min(lengths) >= 1, "lengths", lengths, "one at least, each 1 or more")
    require(seeds >= 1, "seeds", seeds, "1 or more")
    require(max_samples >= 1, "max_samples", max_samples, "1 or more")
    if output is not None:
        make_room(Path(output), "output", ".jsonl")
    torch.set_num_threads(1)
    lines = []
    for length in lengths:
        for name, (process, with_critic, gae_lambda) in METHODS.items():
            for seed in range(seeds):
                start = time.process_time()
                samples, curve = learn(length, process, with_critic, gae_lambda, seed, max_samples=max_samples)
                every = max(1, len(curve) // 60)
                row = {"method": name, "length": length, "seed": seed, "samples": samples}
                row |= {"seconds": round(time.process_time() - start, 2)}
                row |= {"curve": [(n, round(value, 4)) for n, value in [*curve[::every], curve[-1]]]}
                lines.append(json.dumps(row))
                print(lines[-1], flush=True)
    if output is not None:
        write_lines(lines, Path(output))


if __name__ == "__main__":
    command(main)
