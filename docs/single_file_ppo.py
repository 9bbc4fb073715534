"""PPO in a single file, in the manner of CleanRL, on the flat token environment.

    python docs/single_file_ppo.py

Schulman et al. 2017, https://arxiv.org/abs/1707.06347, with the details of Huang et al. 2022,
https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/. Three things know that actions are tokens:
the env's id, the import that registers it, and the embedding. Axes: T steps, B environments.
"""

import argparse

import gymnasium
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import nn
from torch.distributions import Categorical

import token_mdp  # noqa: F401 (registers the ids)


def arguments() -> argparse.ArgumentParser:
    """The script's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env-id", default="LitRLHF/TokenFlat-v0")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--total-timesteps", type=int, default=30_000)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--num-steps", type=int, default=16)
    parser.add_argument("--num-minibatches", type=int, default=4)
    parser.add_argument("--update-epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--gae-lambda", type=float, default=0.95)
    parser.add_argument("--clip-coef", type=float, default=0.2)
    parser.add_argument("--clip-vloss", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--ent-coef", type=float, default=0.01)
    parser.add_argument("--vf-coef", type=float, default=0.5)
    parser.add_argument("--max-grad-norm", type=float, default=0.5)
    return parser


class Agent(nn.Module):
    """Actor and critic on token embeddings side by side."""

    def __init__(self, envs: VectorEnv) -> None:
        super().__init__()
        width, vocab_size = envs.single_observation_space.shape[0], int(envs.single_action_space.n)
        self.embedding = nn.Embedding(vocab_size + 1, 16)  # row 0 is for the empty cells, which hold -1
        self.critic = self._network(16 * width, 1, gain=1.0)
        self.actor = self._network(16 * width, vocab_size, gain=0.01)

    def _network(self, inputs: int, outputs: int, gain: float) -> nn.Sequential:
        hidden, last = nn.Linear(inputs, 64), nn.Linear(64, outputs)
        for layer, scale in ((hidden, 2**0.5), (last, gain)):
            nn.init.orthogonal_(layer.weight, scale)
            nn.init.zeros_(layer.bias)
        return nn.Sequential(hidden, nn.Tanh(), last)

    def forward(self, obs: torch.Tensor) -> tuple[Categorical, torch.Tensor]:
        """Distribution of the next token, and the value of the state (B,); obs (B, P+T) as float32."""
        features = self.embedding(obs.long() + 1).flatten(1)
        return Categorical(logits=self.actor(features)), self.critic(features).squeeze(-1)


def train(options: argparse.Namespace, envs: VectorEnv) -> float:
    """Train an agent; the mean return of the last 100 episodes.

    `envs` may be in either mode of autoreset; "NextStep" adds a transition per episode that no action decides.
    """
    torch.manual_seed(options.seed)
    agent = Agent(envs)
    optimizer = torch.optim.Adam(agent.parameters(), lr=options.learning_rate, eps=1e-5)
    shape = (options.num_steps, options.num_envs)
    all_obs = torch.zeros(*shape, *envs.single_observation_space.shape)
    all_actions, all_logprobs, all_values, all_rewards, all_dones = (torch.zeros(shape) for _ in range(5))
    running, episode_returns = np.zeros(options.num_envs), []

    next_obs = torch.Tensor(envs.reset(seed=options.seed)[0])
    next_done = torch.zeros(options.num_envs)
    num_updates = options.total_timesteps // (options.num_envs * options.num_steps)
    for update in range(num_updates):
        optimizer.param_groups[0]["lr"] = (1 - update / num_updates) * options.learning_rate
        for step in range(options.num_steps):
            all_obs[step], all_dones[step] = next_obs, next_done
            with torch.no_grad():
                distribution, all_values[step] = agent(next_obs)
            action = distribution.sample()
            all_actions[step], all_logprobs[step] = action, distribution.log_prob(action)
            obs, reward, terminated, truncated, _ = envs.step(action.numpy())
            done = terminated | truncated
            running += reward
            episode_returns += running[done].tolist()
            running[done] = 0
            all_rewards[step] = torch.Tensor(reward)
            next_obs, next_done = torch.Tensor(obs), torch.Tensor(done)

        with torch.no_grad():
            next_value = agent(next_obs)[1]
        advantages, last = torch.zeros(shape), torch.zeros(options.num_envs)
        for t in reversed(range(options.num_steps)):
            going_on = 1 - (next_done if t == options.num_steps - 1 else all_dones[t + 1])
            value_after = next_value if t == options.num_steps - 1 else all_values[t + 1]
            delta = all_rewards[t] + options.gamma * value_after * going_on - all_values[t]
            advantages[t] = last = delta + options.gamma * options.gae_lambda * going_on * last
        returns = advantages + all_values

        flat = [x.flatten(0, 1) for x in (all_obs, all_actions, all_logprobs, all_values, advantages, returns)]
        batch_size = options.num_envs * options.num_steps
        for _ in range(options.update_epochs):
            for index in torch.randperm(batch_size).split(batch_size // options.num_minibatches):
                obs_, actions, old_logprobs, old_values, advantage, target = (x[index] for x in flat)
                distribution, values = agent(obs_)
                ratio = (distribution.log_prob(actions) - old_logprobs).exp()
                advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
                clipped = ratio.clamp(1 - options.clip_coef, 1 + options.clip_coef)
                policy_loss = -torch.min(ratio * advantage, clipped * advantage).mean()
                value_errors = (values - target).square()
                if options.clip_vloss:
                    near = old_values + (values - old_values).clamp(-options.clip_coef, options.clip_coef)
                    value_errors = torch.max(value_errors, (near - target).square())
                value_loss = 0.5 * value_errors.mean()
                entropy = distribution.entropy().mean()
                loss = policy_loss - options.ent_coef * entropy + options.vf_coef * value_loss
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(agent.parameters(), options.max_grad_norm)
                optimizer.step()
    return float(np.mean(episode_returns[-100:]))


if __name__ == "__main__":
    torch.set_num_threads(1)  # these networks are too small to share
    chosen = arguments().parse_args()
    mean_return = train(chosen, gymnasium.make_vec(chosen.env_id, chosen.num_envs))
    print(f"mean return of the last 100 episodes: {mean_return:.3f}")
