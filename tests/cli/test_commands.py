"""The commands are all told of, and all there."""

from importlib import import_module

import pytest

from lit_rlhf import UserError
from lit_rlhf.cli.commands import COMMANDS, HELP, PROGRAMS, did_you_mean, require_command


def test_help_has_a_line_that_is_a_sentence_for_every_command():
    lines = [line.split(maxsplit=1) for line in HELP.partition("commands:\n")[2].partition("\n\n")[0].splitlines()]
    assert [name for name, _ in lines] == list(COMMANDS)
    assert all(said[0].isupper() and said.endswith(".") for _, said in lines)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_is_a_function_in_the_file_of_its_name(name):
    assert callable(getattr(import_module(f"lit_rlhf.cli.{name}"), name))


def test_a_command_that_there_is_not_is_answered_with_the_nearest():
    require_command(["fit", "--help"])
    require_command(["--config", "x.yaml", "fit"])
    with pytest.raises(UserError, match=r"no command 'comprae'; did you mean compare\?"):
        require_command(["comprae"])
    assert did_you_mean("zzz", COMMANDS) == ""
    assert did_you_mean("epochs", ["min_epochs", "max_epochs", "steps"]) == "; did you mean max_epochs or min_epochs?"


def test_letters_that_the_locale_cannot_read_are_told_by_argument(monkeypatch):
    require_command(["fit", "--data.train=ü.jsonl"])
    with pytest.raises(UserError, match=r"^--data.train=\\udcc3\\udcbc.jsonl has letters .* LC_ALL=C\.UTF-8"):
        require_command(["fit", "--data.train=\udcc3\udcbc.jsonl"])  # as Python reads an umlaut under LC_ALL=C
    monkeypatch.setattr("os.getcwd", lambda: "/\udcc3\udcbc")
    with pytest.raises(UserError, match=r"^/\\udcc3\\udcbc has letters"):
        require_command(["fit"])


STRAY = {  # command line -> what is said
    "fit validate": "validate: one command at a time; write lit-rlhf fit ..., and then lit-rlhf validate ...",
    "fit a/b.yaml": "a/b.yaml: a config is named by --config; write lit-rlhf fit --config=a/b.yaml",
    "fit --config=a.yaml b.yaml": "b.yaml: a config is named by --config; write lit-rlhf fit --config=b.yaml",
    "-c a.yaml fit b.json": "b.json: a config is named by --config; write lit-rlhf fit --config=b.json",
    "test last.ckpt": "last.ckpt: a checkpoint is named by --ckpt_path; write --ckpt_path=last.ckpt",
    "fit model.policy=x": "model.policy=x: an option begins with two hyphens; write --model.policy=x",
    "fit \N{EN DASH}config=x": "\N{EN DASH}config=x: an option begins with two hyphens; write --config=x",
    "fit \N{EM DASH}config x": "\N{EM DASH}config: an option begins with two hyphens; write --config",
    "fit -model.policy=x": "-model.policy=x: an option begins with two hyphens; write --model.policy=x",
    "fit --model.lora={r: 8}": "8}: the shell has cut a value at its spaces; put it in quotes, as in --model.lora="
    "'{r: 8}'",
    "fit learn": "learn: expected options behind fit, such as --config=configs/sft.yaml",
    "doctor runs/a runs/b": "runs/b: expected options behind doctor; lit-rlhf doctor --help shows them",
    "compare sft dpo": "sft: expected options behind compare; lit-rlhf compare --help shows them",
}


@pytest.mark.parametrize("typed", STRAY)
def test_a_word_that_belongs_to_nothing_is_answered_with_what_to_write(typed):
    with pytest.raises(UserError) as error:
        require_command(typed.split())
    assert str(error.value) == STRAY[typed]


@pytest.mark.parametrize(
    "typed",
    [
        "fit --config x.yaml --model.policy=y --data.train z --print_config",
        "fit -c validate",
        "-c=x.yaml fit",
        "doctor runs/a",
        "doctor --run runs/a",
        "chat runs/sft/model --against runs/ppo/model",
        "compare --policies [a,b] --merge",
        "fit --model.help lit_rlhf.DPO",
        "fit -h",
    ],
)
def test_values_of_options_are_no_stray_words(typed):
    require_command(typed.split())
