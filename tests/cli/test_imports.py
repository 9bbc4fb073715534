"""A module of the user's that fails while it is imported is told with what failed in it, and where."""

import sys
from pathlib import Path

import pytest

from lit_rlhf.cli.imports import failed_import, names_in, path_of_file
from tests.cli.command_line import run
from tests.tiny import save_tiny

MODULES = {  # what a module holds -> what is said of it
    "def f(prompts, responses)\n    return 1\n": "cannot be imported: expected ':', in ",
    "\nraise RuntimeError('set MY_KEY\\nfirst')\n": "cannot be imported: RuntimeError: set MY_KEY first, in ",
    "x = 1\0": "cannot be imported: source code string cannot contain null bytes, in ",
    "import no_such_package\ndef f(p, r): return r\n": "needs the module no_such_package, which is not installed, in ",
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Makes a module of a name of its own that can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def make(content):
        names.append(f"{tmp_path.name.replace('-', '_')}_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(content)
        return names[-1]

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Options of a run of PPO that has a policy."""
    policy, root = save_tiny(tmp_path_factory.mktemp("policy")), tmp_path_factory.mktemp("runs")
    options = [
        f"--model.policy={policy}",
        "--model.critic=null",
        "--trainer.accelerator=cpu",
        f"--trainer.default_root_dir={root}",
    ]
    return ["--config", "configs/ppo.yaml", *options]


@pytest.mark.parametrize("content", MODULES, ids=lambda content: MODULES[content][:30])
def test_what_fails_in_a_module_is_told_with_its_place(content, module):
    name = module(content)
    assert failed_import(f"{{'function': '{name}.f'}}").startswith(f"{name} {MODULES[content]}")


def test_modules_that_are_whole_and_paths_that_are_none_are_no_fault(module):
    name = module("def f(): pass\n")
    for value in (f"{name}.f", f"{name}.g", "no_such_module.f", "json.dumps", "0.5", "runs/sft/model", "a.jsonl"):
        assert failed_import(value) is None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by", ["--data.reward={}", "--data.reward.function={}"])
def test_a_reward_whose_module_fails_is_told_by_option_and_cause(by, module, capsys):
    name = module("raise RuntimeError('set MY_KEY first')\n")
    options = ["--data.reward=lit_rlhf.TextReward"] if "function" in by else []
    assert run("fit", "--config", "configs/ppo.yaml", *options, by.format(f"{name}.f")) == 2
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"error: {by.partition('=')[0]}: {name} cannot be imported: RuntimeError: set MY_KEY first")
    assert said.endswith(f"{name}.py:1")


@pytest.mark.filterwarnings("ignore")
def test_a_module_in_place_of_a_function_is_told_with_one_that_is_in_it(module, capsys):
    whole, broken = module("from json import loads\n_of = 3\ndef score(p, r): return r\n"), module("1 / 0\n")
    wanted = "error: --data.reward: expected an import path, module.name, got"
    for name, near in ((whole, f", such as {whole}.score"), (broken, "")):
        assert run("fit", "--config", "configs/ppo.yaml", f"--data.reward={name}") == 2
        said = f"{wanted} {name}, which is a module; name what is meant in it{near}"
        assert capsys.readouterr().err.splitlines()[0] == said
    assert names_in("lit_rlhf.losses") is names_in("no_such_module") is names_in("docs") is None


@pytest.mark.filterwarnings("ignore")
def test_a_file_in_place_of_an_import_path_is_told_as_such(tmp_path, monkeypatch, capsys):
    config = Path("configs/ppo.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    Path("score.py").write_text("def f(prompts, responses): return [0.0] * len(responses)\n")
    Path("typed.py").write_text("def f(prompts: list) -> list: return {'a': 1}\n")
    assert run("fit", "--config", config, "--data.reward=typed.py") == 2  # which YAML makes something else of
    told = "error: --data.reward: expected an import path, such as typed.f, got the file typed.py"
    assert capsys.readouterr().err.splitlines()[0] == told
    assert run("fit", "--config", config, "--data.reward=./score.py") == 2
    told = "error: --data.reward: expected an import path, such as score.f, got the file ./score.py"
    assert capsys.readouterr().err.splitlines()[0] == told
    function = ["--data.reward=lit_rlhf.TextReward", "--data.reward.function=score.py"]  # whose module is there
    assert run("fit", "--config", config, *function) == 2
    told = "error: --data.reward.function: expected an import path, such as score.f, got the file score.py"
    assert capsys.readouterr().err.splitlines()[0] == told
    for given in ("score.py:f", "score:f", "./score.f"):
        assert run("fit", "--config", config, function[0], f"--data.reward.function={given}") == 2
        told = f"error: --data.reward.function: expected an import path, such as score.f, got {given}"
        assert capsys.readouterr().err.splitlines()[0] == told
    assert run("fit", "--config", config, function[0], "--data.reward.function=my-score.f") == 2
    told = "error: --data.reward.function: expected an import path, module.name, got my-score.f"
    assert capsys.readouterr().err.splitlines()[0] == told


@pytest.mark.parametrize("given", ["my_rewards.brief", "0.1", "my-rewards.py:brief", "C:\\x", "", "brief"])
def test_what_is_no_import_path_written_as_a_file_is_left_alone(given):
    assert path_of_file(given) is None
    assert path_of_file("rewards/my.py:brief") == "rewards.my.brief"
    assert path_of_file("rewards/no_such.py") == "rewards.no_such.score"


@pytest.mark.filterwarnings("ignore")
def test_a_script_that_ends_the_program_while_it_is_imported_is_named(module, capsys):
    name = module("import sys\nsys.exit('usage: score FILE')\n")
    assert run("fit", "--config", "configs/ppo.yaml", f"--data.reward={name}.f") == 2
    assert f"{name}.py:2 ends the program while it is imported (usage: score FILE)" in capsys.readouterr().err


CONSTRUCTORS = {  # what a constructor does -> what is said of it
    "os.environ['MY_KEY']": "KeyError: 'MY_KEY'",
    "open('weights.bin')": "FileNotFoundError: [Errno 2] No such file or directory: 'weights.bin'",
    "raise RuntimeError('set MY_KEY')": "RuntimeError: set MY_KEY",
    "int('x')": "ValueError: invalid literal for int() with base 10: 'x'",
    "json.loads('{')": "JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
}
PARTS = {  # option -> what a class named by it stands on
    "--data.reward": "object",
    "--data.backend": "lit_rlhf.RolloutBackend",
    "--model.kl": "lit_rlhf.FixedKL",
    "--trainer.callbacks": "lightning.pytorch.callbacks.Callback",
    "--trainer.logger": "lightning.pytorch.loggers.CSVLogger",
}
FAILING = """import json, os
import lit_rlhf, lightning.pytorch.callbacks, lightning.pytorch.loggers
class Own({base}):
    def __init__(self):
        {body}
    def __call__(self, prompts, responses):
        return [1.0] * len(responses)
def score(prompts, responses):
    return [1.0] * len(responses)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("command", "option", "body"),
    [("fit", "--data.reward", body) for body in CONSTRUCTORS]
    + [("fit", option, "os.environ['MY_KEY']") for option in [*PARTS][1:]]
    + [("plan", "--data.reward", "os.environ['MY_KEY']")],
)
def test_a_class_that_cannot_be_made_is_told_by_option_class_cause_and_place(
    command, option, body, module, start, capsys
):
    name = module(FAILING.format(base=PARTS[option], body=body))
    assert run(command, *start, f"--data.reward={name}.score", f"{option}={name}.Own") == 2
    said = capsys.readouterr().err.splitlines()
    told = f"error: {option}: {name}.Own cannot be made: {CONSTRUCTORS[body]}, in "
    assert said[-1].startswith(told) and said[-1].endswith(f"{name}.py:5")


@pytest.mark.filterwarnings("ignore")
def test_a_class_that_a_config_names_is_told_by_its_line(module, start, tmp_path, capsys):
    name = module(FAILING.format(base="object", body="os.environ['MY_KEY']"))
    config = tmp_path / "own.yaml"
    config.write_text(f"data:\n  init_args:\n    reward:\n      class_path: {name}.Own\n")
    assert run("fit", *start, "--config", config) == 2
    assert (
        f"{config}, line 4, data.reward.class_path: {name}.Own cannot be made: KeyError: 'MY_KEY', in "
        in capsys.readouterr().err
    )
