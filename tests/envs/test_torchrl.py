"""TorchRL plays the env: its spec checker, its wrappers, and PPO with GAE from a collector."""

import multiprocessing

import gymnasium
import pytest
from token_tasks import VOCAB, task, toy_score, weighted_sum

from token_mdp import TokenVectorEnv

pytest.importorskip("torchrl", reason="needs the extra `agents`")

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, GymWrapper
from torchrl.envs.utils import check_env_specs
from torchrl.modules import ProbabilisticActor, ValueOperator
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

multiprocessing.set_start_method(None, force=True)  # TorchRL sets it for the whole process, and so for all other tests

ENVS = {
    "GymEnv": lambda: GymEnv("LitRLHF/Token-v0"),
    "GymEnv, flat": lambda: GymEnv("LitRLHF/TokenFlat-v0"),
    "GymWrapper": lambda: GymWrapper(gymnasium.make("LitRLHF/Token-v0")),
    "GymWrapper, native": lambda: GymWrapper(
        gymnasium.make_vec("LitRLHF/Token-v0", num_envs=4, autoreset_mode="Disabled")
    ),
    "GymWrapper, native flat": lambda: GymWrapper(
        gymnasium.make_vec("LitRLHF/TokenFlat-v0", num_envs=4, autoreset_mode="Disabled")
    ),
    "GymWrapper, native SameStep": lambda: GymWrapper(gymnasium.make_vec("LitRLHF/Token-v0", num_envs=4)),
}


@pytest.mark.plays(
    "torchrl",
    "`check_env_specs` of `GymEnv`, `GymWrapper`",
    "single and native, Dict and flat; native Disabled and SameStep",
)
@pytest.mark.parametrize("make", ENVS.values(), ids=ENVS)
def test_check_env_specs_accepts_every_way_to_make_the_env(make):
    check_env_specs(make())


@pytest.mark.plays("torchrl", "terminal observations of `GymWrapper`", "native, Disabled and SameStep")
@pytest.mark.parametrize("mode", ["Disabled", "SameStep"])
def test_the_next_observation_of_an_ended_episode_is_its_last_and_not_the_refill(mode):
    env = GymWrapper(TokenVectorEnv(num_envs=3, autoreset_mode=mode, **task()), categorical_action_encoding=True)
    state = env.reset()
    ends = 0
    for actions in torch.randint(VOCAB, (30, 3), generator=torch.Generator().manual_seed(0)):
        before, state = env.step_and_maybe_reset(state.set("action", actions))
        seen = before["next"]
        for slot in seen["done"].flatten().nonzero().flatten().tolist():
            cut, length = int(seen["prompt_length"][slot]), int(seen["length"][slot])
            ids = seen["input_ids"][slot].numpy()
            assert seen["attention_mask"][slot].sum() == length > cut and ids[length - 1] == actions[slot]
            # The reward tells apart any two episodes.
            assert seen["reward"][slot] == weighted_sum([ids[:cut]], [ids[cut:length]])[0]
            assert state["length"][slot] == state["prompt_length"][slot]  # and the refill comes after it
            ends += 1
    assert ends > 10


class Network(nn.Module):
    """Token embeddings side by side, and an MLP on top of them."""

    def __init__(self, width, vocab_size, outputs):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 16)
        self.head = nn.Sequential(nn.Linear(16 * width, 64), nn.Tanh(), nn.Linear(64, outputs))

    def forward(self, input_ids, attention_mask):
        return self.head((self.embedding(input_ids) * attention_mask.unsqueeze(-1)).flatten(-2))


@pytest.mark.plays("torchrl", "`Collector`, `ClipPPOLoss` and `GAE` solve the toy task", "native, Disabled")
def test_ppo_of_torchrl_solves_the_toy_task():
    torch.manual_seed(0)
    env = GymWrapper(
        gymnasium.make_vec("LitRLHF/Token-v0", num_envs=64, autoreset_mode="Disabled"),
        categorical_action_encoding=True,  # one-hot actions would be V wide
    )
    env.set_seed(0)
    keys = ["input_ids", "attention_mask"]
    actor = ProbabilisticActor(
        TensorDictModule(Network(7, 6, 6), in_keys=keys, out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    critic = ValueOperator(Network(7, 6, 1), in_keys=keys)
    advantage = GAE(gamma=1.0, lmbda=0.95, value_network=critic)
    loss_module = ClipPPOLoss(actor, critic, entropy_coeff=0.01)
    optimizer = torch.optim.Adam(loss_module.parameters(), lr=3e-3)
    collector = Collector(
        env, actor, frames_per_batch=1024, total_frames=20 * 1024, auto_register_policy_transforms=False
    )
    for data in collector:
        advantage(data)
        for _ in range(4):
            for minibatch in data.reshape(-1)[torch.randperm(1024)].split(256):
                losses = loss_module(minibatch)
                optimizer.zero_grad()
                (losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]).backward()
                optimizer.step()
    collector.shutdown()

    def greedy(observations):
        batch = TensorDict({key: torch.from_numpy(observations[key]) for key in keys}, batch_size=[20])
        return actor.module[0](batch)["logits"].argmax(-1)

    assert toy_score(greedy) >= 0.9
