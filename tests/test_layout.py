"""`tests/` mirrors the rooms: a test file for each source file, of its name, and none too long to read."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
LONGEST = 350  # lines of a file in here

# Source files without a test file of their own, each with the reason.
UNTESTED = {
    "lit_rlhf/data/batches.py": "types without code",
}
# Test files that stand for a thing of several files: whole runs, promises over a room, other people's libraries.
THINGS = {
    "algorithms/test_deepspeed.py": "another library",
    "algorithms/test_held_weights.py": "whole runs",
    "algorithms/test_lora.py": "whole runs",
    "algorithms/test_policy_gradient.py": "theory",
    "algorithms/test_quantized.py": "whole runs",
    "algorithms/test_retrained.py": "whole runs",
    "benchmarks/": "of the folder benchmarks/",
    "callbacks/test_tensorboard.py": "whole runs",
    "callbacks/test_tensorboard_tabs.py": "another program",
    "cli/test_configs.py": "of the folder configs/",
    "cli/test_large_configs.py": "of the folder configs/large/",
    "cli/test_predict.py": "whole runs",
    "envs/test_compatibility.py": "a table of the docs",
    "envs/test_equivalence.py": "two environments against each other",
    "envs/test_language_model_policy.py": "an example of the docs",
    "envs/test_rllib.py": "another library",
    "envs/test_single_file_ppo.py": "an example of the docs",
    "envs/test_speed.py": "both environments",
    "envs/test_stable_baselines3.py": "another library",
    "envs/test_step_rewards.py": "process rewards and shaping, in both environments",
    "envs/test_tianshou.py": "another library",
    "envs/test_torchrl.py": "another library",
    "envs/test_wrappers.py": "another library",
    "losses/test_family.py": "what holds for every preference loss",
    "models/test_cut_reading.py": "from reading to pieces",
    "test_api.py": "of the docs",
    "test_audit.py": "of a tool beside it",
    "test_docs.py": "of the docs",
    "test_docs_options.py": "of the docs",
    "test_layout.py": "of this folder",
    "torture/": "of the folder itself",
    "website/": "of the folder website/",
    "test_security.py": "what strangers hand over, anywhere",
    "test_wheel.py": "the package that is built",
}


def has_code(file):
    """Whether a source file defines a function or a class; others hand names on."""
    return any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(ast.parse(file.read_text())))


def mirrored():
    """Each source file with code, and the path of its test file in here."""
    for package, room in ((ROOT / "lit_rlhf", ""), (ROOT / "envs" / "token_mdp", "envs")):
        for file in sorted(package.rglob("*.py")):
            if has_code(file):
                folder = Path(room) / file.parent.relative_to(package)
                yield file.relative_to(ROOT).as_posix(), (folder / f"test_{file.stem.strip('_')}.py").as_posix()


SOURCES = dict(mirrored())


def test_there_are_sources_to_mirror():
    assert SOURCES["lit_rlhf/algorithms/ppo.py"] == "algorithms/test_ppo.py"
    assert SOURCES["lit_rlhf/files.py"] == "test_files.py"
    assert SOURCES["lit_rlhf/demo/__main__.py"] == "demo/test_main.py"
    assert SOURCES["envs/token_mdp/slots.py"] == "envs/test_slots.py"


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_file_has_the_test_file_of_its_name(source):
    if source in UNTESTED:
        assert not (TESTS / SOURCES[source]).exists(), f"{source} has tests: take it out of UNTESTED"
    else:
        assert (TESTS / SOURCES[source]).exists(), f"write tests/{SOURCES[source]}"


def test_a_test_file_has_the_name_of_a_source_file_or_is_listed_as_standing_for_more():
    named = {path for source, path in SOURCES.items() if source not in UNTESTED}
    found = {file.relative_to(TESTS).as_posix() for file in TESTS.rglob("test_*.py")}
    strays = {path for path in found - named if not any(path.startswith(thing) for thing in THINGS)}
    assert not strays, "move their tests to the files of what they test, or list them in THINGS"


def test_exceptions_are_of_files_that_are_there():
    assert UNTESTED.keys() <= SOURCES.keys()
    assert all((TESTS / thing).exists() for thing in THINGS)
    assert not THINGS.keys() & set(SOURCES.values())


def test_no_file_is_longer_than_can_be_read_in_one_go():
    lengths = {file.relative_to(TESTS).as_posix(): len(file.read_text().splitlines()) for file in TESTS.rglob("*.py")}
    assert {path: length for path, length in lengths.items() if length > LONGEST} == {}
