"""The single-file PPO of the docs, in CleanRL's manner, on the flat observation."""

import importlib.util
from pathlib import Path

import gymnasium
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import token_mdp  # noqa: F401 (registers the ids)

pytest.importorskip("torch", reason="the script is a torch program")

SCRIPT = Path(__file__).parents[2] / "docs" / "single_file_ppo.py"


def native(num_envs):
    return gymnasium.make_vec("LitRLHF/TokenFlat-v0", num_envs)


def sync(num_envs):
    makers = [lambda: gymnasium.make("LitRLHF/TokenFlat-v0")] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)


@pytest.mark.plays(
    "gymnasium", "a single-file PPO in CleanRL's manner solves the toy task", "flat; native, `SyncVectorEnv`"
)
@pytest.mark.parametrize("make", [native, sync])
def test_a_single_file_ppo_in_cleanrls_manner_solves_the_toy_task(make):
    spec = importlib.util.spec_from_file_location("single_file_ppo", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    options = script.arguments().parse_args([])
    assert script.train(options, make(options.num_envs)) >= 0.9
