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
