"""Rows as JSON text, which is how they are cached: messages of any shape fit, and Arrow infers nothing.

Times and decimals become their text, as a chat template would print them.
"""

import datetime
import decimal
import json
import uuid
from collections.abc import Callable
from typing import Any

from lit_rlhf.errors import UserError

TEXT_LIKE = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)
JSON_TYPES = (str, int, float, list, tuple, dict, type(None), *TEXT_LIKE)


def as_json(row: Any, place: str) -> str:
    """A row as JSON.

    Raises:
        UserError: it holds what JSON in UTF-8 cannot say; names place and column.
    """
    return _written(row, place, _as_text)


def require_text(row: Any, place: str) -> None:
    """Refuse a row whose text cannot be written again; its other values may be anything.

    Raises:
        UserError: half a character, or values nested without end.
    """
    _written(row, place, str)


def find(row: Any, wanted: Callable[[Any], bool]) -> tuple[str, Any]:
    """Where the first value in a row lies that is wanted, as ", column 'messages', at [0].sent", and the value.

    Keys count as values; nothing is said of where the whole row lies.
    """
    found = _steps(row, wanted)
    if found is None:
        return "", row
    (column, *rest), value = found
    deeper = "".join(f"[{step}]" if isinstance(step, int) else f".{ascii(step)[1:-1]}" for step in rest).lstrip(".")
    return f", column {column!a}{f', at {deeper}' if deeper else ''}", value


def _written(row: Any, place: str, default: Callable[[Any], Any]) -> str:
    try:
        text = json.dumps(row, ensure_ascii=False, default=default)
        if not text.isascii():
            text.encode()
        return text
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        where, _ = find(row, lambda value: isinstance(value, str) and half in value)
        raise UserError(
            f"{place}{where}: {half!a} is half of a character, which UTF-8 cannot hold; mend the text where it was "
            "cut, or leave the row out"
        ) from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deep to be read; leave out the column that is") from error
    except TypeError as error:
        where, value = find(row, lambda value: not isinstance(value, JSON_TYPES))
        raise UserError(
            f"{place}{where}: expected text, a number, true, false, null, or lists and objects of them; found "
            f"{type(value).__name__}; convert it, or leave it out"
        ) from error


def _as_text(value: Any) -> str:
    if isinstance(value, TEXT_LIKE):
        return str(value)
    raise TypeError(type(value).__name__)


def _steps(value: Any, wanted: Callable[[Any], bool]) -> tuple[list[str | int], Any] | None:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for step, part in inner:
        if wanted(part) or wanted(step):
            return [step], part
        if deeper := _steps(part, wanted):
            return [step, *deeper[0]], deeper[1]
    return None
