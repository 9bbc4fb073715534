"""The single-file PPO of the docs, in CleanRL's manner, on the flat observation."""

from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics

import token_mdp  # noqa: F401 (registers the ids)
from tests.scripts import load_script

pytest.importorskip("torch", reason="the script is a torch program")

SCRIPT = Path(__file__).parents[2] / "docs" / "single_file_ppo.py"


def native(num_envs):
    return gymnasium.make_vec("LitRLHF/TokenFlat-v0", num_envs)


def sync(num_envs, mode=AutoresetMode.SAME_STEP):
    makers = [lambda: RecordEpisodeStatistics(gymnasium.make("LitRLHF/TokenFlat-v0"))] * num_envs
    return SyncVectorEnv(makers, autoreset_mode=mode)


def cleanrls(num_envs):
    """CleanRL's own scripts leave the mode at Gymnasium's default."""
    return sync(num_envs, AutoresetMode.NEXT_STEP)


@pytest.fixture(scope="module")
def script():
    return load_script(SCRIPT)


@pytest.mark.plays(
    "gymnasium",
    "a single-file PPO in CleanRL's manner solves the toy task",
    "flat; native, `SyncVectorEnv` SameStep and NextStep",
)
@pytest.mark.parametrize("make", [native, *(pytest.param(make, marks=pytest.mark.slow) for make in (sync, cleanrls))])
def test_a_single_file_ppo_in_cleanrls_manner_solves_the_toy_task(make, script):
    options = script.arguments().parse_args([])
    assert script.train(options, make(options.num_envs)) >= 0.9


def test_the_stack_of_cleanrl_tells_of_every_episode():
    envs = sync(3)
    envs.reset(seed=0)
    *_, infos = envs.step(np.array([0, 1, 0]))  # two end tokens
    np.testing.assert_array_equal(infos["final_info"]["_episode"], [True, False, True])
    np.testing.assert_array_equal(infos["final_info"]["episode"]["l"], [1, 0, 1])


def test_the_value_loss_is_clipped_unless_that_is_turned_off(script):
    def returns(*options):
        short = ["--total-timesteps", "512", "--num-envs", "8", "--clip-coef", "1e-6", "--learning-rate", "0.1"]
        return script.train(script.arguments().parse_args([*short, *options]), native(8))

    assert returns() == returns("--clip-vloss") != returns("--no-clip-vloss")
