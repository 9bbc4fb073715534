"""Tianshou plays the env: its collector and its PPO."""

import gymnasium
import numpy as np
import pytest
from token_tasks import toy_score

pytest.importorskip("tianshou", reason="needs the extra `agents`")

import torch
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.algorithm.optim import AdamOptimizerFactory
from tianshou.data import Batch, Collector, CollectStats, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import ModuleWithVectorOutput
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic
from torch import nn


class Tokens(ModuleWithVectorOutput):
    """Token embeddings side by side."""

    def __init__(self, width, vocab_size):
        super().__init__(16 * width)
        self.embedding = nn.Embedding(vocab_size, 16)

    def forward(self, obs, state=None, info=None):
        ids, mask = torch.as_tensor(obs.input_ids), torch.as_tensor(obs.attention_mask)
        return (self.embedding(ids) * mask.unsqueeze(-1)).flatten(1), state


def envs(number):
    made = DummyVectorEnv([lambda: gymnasium.make("LitRLHF/Token-v0")] * number)
    made.seed(0)
    return made


def actor_policy():
    actor = DiscreteActor(preprocess_net=Tokens(7, 6), action_shape=6, hidden_sizes=(64,), softmax_output=False)
    return DiscreteActorPolicy(actor=actor, action_space=gymnasium.spaces.Discrete(6))


@pytest.mark.plays("tianshou", "`Collector`", "single in `DummyVectorEnv`")
def test_the_collector_of_tianshou_collects_whole_episodes():
    torch.manual_seed(0)
    collector = Collector[CollectStats](actor_policy(), envs(4), VectorReplayBuffer(1000, 4))
    stats = collector.collect(n_episode=30, reset_before_collect=True)
    assert stats.n_collected_episodes == 30
    buffer = collector.buffer
    ends = np.flatnonzero(buffer.terminated)
    assert not buffer.truncated.any()
    lengths = buffer.info["response_length"][ends]
    assert lengths.min() >= 1 and lengths.max() <= 4
    # What follows an end is its own last observation, not the next prompt.
    np.testing.assert_array_equal(
        buffer.obs_next["length"][ends][:, 0], buffer.obs_next["prompt_length"][ends][:, 0] + lengths
    )


@pytest.mark.plays("tianshou", "PPO solves the toy task", "single in `DummyVectorEnv`")
def test_ppo_of_tianshou_solves_the_toy_task():
    torch.manual_seed(0)
    np.random.seed(0)
    policy = actor_policy()
    algorithm = PPO(
        policy=policy,
        critic=DiscreteCritic(preprocess_net=Tokens(7, 6), hidden_sizes=(64,)),
        optim=AdamOptimizerFactory(lr=5e-3),
        gamma=1.0,
    )
    algorithm.run_training(
        OnPolicyTrainerParams(
            training_collector=Collector[CollectStats](algorithm, envs(16), VectorReplayBuffer(1024, 16)),
            max_epochs=1,
            epoch_num_steps=8 * 1024,
            collection_step_num_env_steps=512,
            batch_size=128,
            update_step_num_repetitions=6,
            test_in_training=False,
            verbose=False,
            show_progress=False,
        )
    )

    def greedy(observations):
        with torch.no_grad():
            return policy.actor(Batch(observations))[0].argmax(-1)

    assert toy_score(greedy) >= 0.9
