"""RLlib plays the env, in an environment of its own: it pins an older Gymnasium (see docs/agents.md)."""

import gymnasium
import numpy as np
import pytest

import token_mdp  # noqa: F401 (registers the ids)

pytest.importorskip("ray", reason="RLlib has an environment of its own: make rllib")

import ray
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.connectors.env_to_module import FlattenObservations
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]  # warnings of RLlib about itself


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def config(env_id, num_env_runners=0):
    return (
        PPOConfig()
        .environment(env_id)
        .env_runners(
            num_env_runners=num_env_runners,
            num_envs_per_env_runner=16,
            env_to_module_connector=lambda env, spaces, device: FlattenObservations(),
        )
        .training(train_batch_size_per_learner=1024, minibatch_size=256, num_epochs=6, lr=5e-3, gamma=1.0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[64, 64]))
        .debugging(seed=0)
    )


@pytest.mark.plays("ray", "PPO with `FlattenObservations`", "single, Dict; also in a remote env runner")
@pytest.mark.parametrize("num_env_runners", [0, 1])
def test_ppo_of_rllib_trains_on_an_id_that_no_one_imported(cluster, num_env_runners):
    algorithm = config("token_mdp:LitRLHF/Token-v0", num_env_runners).build_algo()
    results = algorithm.train()["env_runners"]
    assert results["num_env_steps_sampled"] >= 1024
    assert 0.0 <= results["episode_return_mean"] <= 1.0
    assert 1.0 <= results["episode_len_mean"] <= 4.0
    algorithm.stop()


@pytest.mark.plays("ray", "PPO solves the toy task", "single, flat")
def test_ppo_of_rllib_solves_the_toy_task(cluster):
    algorithm = config("token_mdp:LitRLHF/TokenFlat-v0").build_algo()
    for _ in range(40):
        if algorithm.train()["env_runners"]["episode_return_mean"] >= 0.9:
            break
    module = algorithm.get_module()
    env = gymnasium.make("LitRLHF/TokenFlat-v0")
    scores = []
    for prompt_index in range(20):
        observation, _ = env.reset(options={"prompt_index": prompt_index})
        terminated = False
        while not terminated:
            batch = {Columns.OBS: torch.from_numpy(observation[None].astype(np.float32))}
            logits = module.forward_inference(batch)[Columns.ACTION_DIST_INPUTS]
            observation, reward, terminated, _, _ = env.step(int(logits.argmax()))
        scores.append(reward)
    algorithm.stop()
    assert np.mean(scores) >= 0.9
