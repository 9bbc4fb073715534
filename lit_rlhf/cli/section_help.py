"""The help of one section of a run's options, where that of all would be a wall."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


class SectionHelp(argparse.Action):
    """`--trainer.help`: the options of one section."""

    def __init__(self, option_strings: Sequence[str], help: str, **others: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *given: Any, **others: Any) -> NoReturn:
        """Print them, and end the program."""
        assert isinstance(parser, ArgumentParser) and parser.groups is not None
        formatter = parser._get_formatter()
        section = parser.groups[self.option_strings[0].strip("-").partition(".")[0]]
        formatter.start_section(section.title)
        formatter.add_arguments(action for action in section._group_actions if action is not self)
        formatter.end_section()
        print(formatter.format_help(), end="")
        raise SystemExit(0)
