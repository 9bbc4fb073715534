import ast
import copy
import doctest
import json
import pickle
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode
from token_tasks import assert_same, task, weighted_sum

import token_mdp
from token_mdp import Shared, TokenEnv, TokenVectorEnv
from token_mdp.registration import IDS

OPTIONAL = {"sb3.py": {"stable_baselines3"}, "pictures.py": {"PIL"}}  # asked for by name, by those who have it


def test_importing_the_package_loads_neither_torch_nor_lit_rlhf():
    code = "import sys, json, token_mdp; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    paths = [path for path in sys.path if path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {code}"], capture_output=True, check=True
    )
    loaded = set(json.loads(done.stdout))
    assert {"token_mdp", "gymnasium", "numpy"} <= loaded
    assert not {"torch", "lit_rlhf", "transformers", "lightning", "stable_baselines3"} & loaded


def test_its_files_import_gymnasium_and_numpy_alone():
    package = Path(token_mdp.__file__).parent
    for file in package.glob("*.py"):
        own = OPTIONAL.get(file.name, set())
        nodes = [
            node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in nodes if isinstance(node, ast.ImportFrom)]
        others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
        assert others <= {"token_mdp", "gymnasium", "numpy"} | own, file.name


@pytest.mark.plays("gymnasium", "`make` without arguments; `token_mdp:` in place of an import", "single, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_an_id_runs_without_arguments_and_without_an_import(env_id):
    env = gymnasium.make(f"token_mdp:{env_id}")
    env.reset(seed=0)
    terminated = False
    while not terminated:
        _, _, terminated, _, _ = env.step(env.action_space.sample())
    assert isinstance(env.unwrapped, TokenEnv)


@pytest.mark.plays("gymnasium", "`make_vec`", "native, Dict and flat")
@pytest.mark.parametrize("env_id", IDS)
def test_make_vec_gives_the_native_vector_env(env_id):
    env = gymnasium.make_vec(env_id, num_envs=3)
    assert isinstance(env, TokenVectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    assert env.reset(seed=0)[0] in env.observation_space


def test_make_takes_the_callers_task_or_changes_the_toy_one():
    env = gymnasium.make("LitRLHF/Token-v0", **task())
    assert env.action_space.n == 8
    assert gymnasium.make("LitRLHF/Token-v0", max_new_tokens=9).observation_space["input_ids"].shape == (12,)
    vector = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=2, autoreset_mode="Disabled", copy=False, max_new_tokens=9)
    assert vector.single_observation_space["input_ids"].shape == (12,)
    assert vector.autoreset_mode == AutoresetMode.DISABLED


def test_own_prompts_get_nothing_from_the_toy_task():
    with pytest.raises(ValueError, match=r"needs \['vocab_size', 'stop_token_ids', 'max_new_tokens'\] too"):
        gymnasium.make("LitRLHF/Token-v0", prompts=[[1]])


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_the_toy_prompts_are_not_played_with_words_of_another_task(make):
    own = {name: value for name, value in task(columns={"answer": [1, 2, 3]}).items() if name != "prompts"}
    with pytest.raises(ValueError, match=r"\['vocab_size', 'stop_token_ids', 'columns'\] without prompts"):
        make("LitRLHF/Token-v0", **own)


@pytest.mark.parametrize(
    ("make", "changes", "message"),
    [
        (
            gymnasium.make,
            {"vocab_sise": 8},
            "TokenEnv got an unexpected keyword argument 'vocab_sise'; did you mean 'vocab_size'?",
        ),
        (
            gymnasium.make_vec,
            {"max_episode": 8},
            "TokenVectorEnv got an unexpected keyword argument 'max_episode'; did you mean 'max_ep",
        ),
        (gymnasium.make, {"qqq": 8}, "TokenEnv got an unexpected keyword argument 'qqq'"),
        (
            gymnasium.make,
            {"reward_mode": "deferred"},
            "unexpected keyword argument 'reward_mode'; it is one of gymnasium.make_vec",
        ),
        (gymnasium.make, {"render_mode": "depth_array"}, "render_mode ('depth_array') must be None or one of"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is being initialised with render_mode")
def test_a_wrong_argument_is_named_without_the_data(make, changes, message):
    with pytest.raises(ValueError) as error:
        make("LitRLHF/Token-v0", **task(prompts=[[1, 2, 3]] * 1000), **changes)
    assert message in str(error.value) and len(str(error.value)) < 200


def test_no_id_has_a_time_limit_or_live_objects():
    for env_id in IDS:
        spec = gymnasium.spec(env_id)
        assert spec.max_episode_steps is None
        assert all(isinstance(value, str) for value in spec.kwargs.values())
        json.loads(spec.to_json())


def test_make_vec_passes_max_episode_steps_on():
    env = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=2, max_episode_steps=2)
    env.reset()
    env.step(np.array([1, 1]))
    assert env.step(np.array([1, 1]))[2].all()
    sync = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=2, max_episode_steps=2, vectorization_mode="sync")
    sync.reset()
    sync.step(np.array([1, 1]))
    _, rewards, terminated, truncated, _ = sync.step(np.array([1, 1]))
    assert truncated.all() and not terminated.any() and not rewards.any()  # Gymnasium's TimeLimit, as the docs warn


@pytest.mark.plays("gymnasium", "pickled specs make the env again", "single, native")
def test_a_spec_is_picklable_and_makes_the_same_env_again():
    env = gymnasium.make("LitRLHF/Token-v0", **task(reward_fn=weighted_sum))
    again = gymnasium.make(pickle.loads(pickle.dumps(env.spec)))
    for seed in range(3):
        left, right = env.reset(seed=seed), again.reset(seed=seed)
        np.testing.assert_array_equal(left[0]["input_ids"], right[0]["input_ids"])
    assert env.step(7)[1] == again.step(7)[1] != 0.0
    vector = gymnasium.make_vec("LitRLHF/Token-v0", num_envs=2, **task())
    vector_again = gymnasium.make_vec(pickle.loads(pickle.dumps(vector.spec)))
    assert_same(vector_again.reset(seed=4), vector.reset(seed=4))
    for actions in ([1, 7], [7, 2], [3, 3]):
        assert_same(vector_again.step(np.array(actions)), vector.step(np.array(actions)))


def test_the_example_of_the_package_shows_what_it_prints():
    assert doctest.testmod(token_mdp) == (0, 5)


class Uncopyable:
    def __deepcopy__(self, memo):
        raise AssertionError("the reward model was copied")

    def __call__(self, prompts, responses):
        return [1.0] * len(responses)


def test_a_shared_reward_model_is_not_copied_by_specs():
    env = gymnasium.make("LitRLHF/Token-v0", reward_fn=Shared(Uncopyable()))
    env = gymnasium.wrappers.RecordEpisodeStatistics(env)
    assert env.spec is not None and env.unwrapped.spec is not None
    env.reset()
    assert env.step(0)[1] == 1.0
    gymnasium.make_vec("LitRLHF/Token-v0", num_envs=2, reward_fn=Shared(Uncopyable()))


def test_registering_twice_changes_nothing():
    before = copy.copy(gymnasium.registry)
    token_mdp.register_all()
    assert gymnasium.registry == before
