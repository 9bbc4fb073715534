"""Rewards that can be checked by rule: the right answer, a pattern, code that parses. For `reward_on="text"`.

Each is a class whose instance is a reward function (prompts, responses, **columns) -> (n,) of 0.0 and 1.0, so that a
YAML file can name it, and several combine with weights:
`reward_fn={"answer": ExactAnswer(), "form": (RegexMatch("<think>.*</think>"), 0.2)}`.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Collection
from decimal import Decimal, InvalidOperation
from numbers import Real
from typing import Any

import numpy as np

from token_mdp.checks import check_flag
from token_mdp.episodes import FloatArray

__all__ = ["ExactAnswer", "PythonParses", "RegexMatch"]

# A sign before or after the currency, as in -$5 and $-5; commas only where they group digits.
NUMBER = re.compile(
    r"([+-]?)(?:[$€£]\s*)?([+-]?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+(?:e[+-]?\d+)?)"
)
FENCE = re.compile(r"(?:^([ \t]*))?```[^\n`]*\n(.*?)```", re.DOTALL | re.MULTILINE)


class ExactAnswer:
    r"""1 where the answer in the response equals the one in a column of the prompts, else 0.

    Two answers are equal if they are the same number ("1,234", "$1234" and "1234.0"; "-$5", "$-5" and "−5"), or the
    same text up to case, spaces around it and a full stop at its end. A percentage is text: "50%" is neither 50 nor
    0.5. An answer that is empty or missing (None, NaN) is never right.

    Args:
        column: name of the column that holds the right answers.
        pattern: regular expression with one group around the answer, as r"####\s*(.+)"; its last match counts.
            It is applied to the column too where it matches there. None takes the whole response.

    Raises:
        ValueError: the pattern is no regular expression, or has no group or more than one.
    """

    def __init__(self, column: str = "answer", pattern: str | None = None) -> None:
        self.column = column
        self.reads_columns = (column,)
        self.pattern = None if pattern is None else _compiled(pattern)
        if self.pattern is not None and self.pattern.groups != 1:
            raise ValueError(
                f"pattern ({pattern!r}) must have one group, around the answer; it has {self.pattern.groups}"
            )

    def check_columns(self, names: Collection[str]) -> None:
        """Refuse columns without the one that holds the right answers."""
        if self.column not in names:
            raise KeyError(f"there is no column {self.column!r} with the right answers; there are {sorted(names)}")

    def __call__(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> FloatArray:
        """(n,) 1.0 where the answers are equal."""
        self.check_columns(columns)
        right = ["" if _missing(answer) else str(answer) for answer in columns[self.column]]
        right = [self._extract(answer) or answer for answer in right]
        given = [self._extract(_text(response)) or "" for response in responses]
        return np.array([float(_plain(a) != "" and _same(a, b)) for a, b in zip(given, right, strict=True)])

    def _extract(self, text: str) -> str | None:
        if self.pattern is None:
            return text
        found = self.pattern.findall(text)
        return found[-1] if found else None


class RegexMatch:
    """1 where the pattern is found in the response, else 0.

    Args:
        pattern: regular expression; `.` also matches line breaks.
        whole: the pattern must match the whole response.
    """

    reads_columns = ()

    def __init__(self, pattern: str, whole: bool = False) -> None:
        self.pattern = _compiled(pattern, re.DOTALL)
        check_flag("whole", whole)
        self.whole = whole

    def __call__(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> FloatArray:
        """(n,) 1.0 where the pattern matches."""
        match = self.pattern.fullmatch if self.whole else self.pattern.search
        return np.array([float(match(_text(response)) is not None) for response in responses])


class PythonParses:
    """1 where the response is Python code that parses, else 0; the code is never run.

    Where the response has fenced blocks, all of them must parse and the text around them is ignored; without a fence
    the whole response is code, in which a word alone parses too. Lines of a block lose the indentation of its fence, as
    in a list. Code without a statement, empty or of comments, is 0; so is a fence left open, as by the length limit.
    Three backticks end a block wherever they stand.
    """

    reads_columns = ()

    def __call__(self, prompts: list[str], responses: list[str], **columns: list[Any]) -> FloatArray:
        """(n,) 1.0 where the code parses."""
        return np.array([float(all(map(_parses, _code_blocks(_text(response))))) for response in responses])


def _compiled(pattern: Any, flags: int = 0) -> re.Pattern[str]:
    if not isinstance(pattern, str):
        raise ValueError(f"pattern ({pattern!r}) must be a regular expression as a string")
    try:
        return re.compile(pattern, flags)
    except re.error as error:
        raise ValueError(f"pattern ({pattern!r}) is no regular expression: {error}") from error


def _code_blocks(text: str) -> list[str]:
    blocks = [
        re.sub(rf"^[ \t]{{1,{len(indent)}}}", "", code, flags=re.MULTILINE) if indent else code
        for indent, code in FENCE.findall(text)
    ]
    return blocks or [text]


def _parses(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as for "\d" in a string: odd, but it parses
            return bool(ast.parse(code).body)  # has a statement
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes; brackets nested too deeply
        return False


def _missing(answer: Any) -> bool:
    return answer is None or (isinstance(answer, Real) and bool(answer != answer))


def _same(left: str, right: str) -> bool:
    left_number, right_number = _number(left), _number(right)
    if left_number is not None and right_number is not None:
        return left_number == right_number
    return _plain(left) == _plain(right)


def _number(text: str) -> Decimal | None:
    found = NUMBER.fullmatch(_plain(text).replace("\N{MINUS SIGN}", "-"))
    if found is None:
        return None
    try:  # two signs make no number
        number = Decimal(found[1] + found[2] + found[3].replace(",", ""))
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip().casefold()


def _text(response: Any) -> str:
    if not isinstance(response, str):
        raise TypeError(f"this reward reads text, got {type(response).__name__}; make the env with reward_on='text'")
    return response
