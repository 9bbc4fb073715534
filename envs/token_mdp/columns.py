"""Columns of the prompts, such as right answers, and which of them a function is handed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from token_mdp.rewards import bare


def named_columns(function: Callable[..., Any]) -> set[str] | None:
    """The columns that a function (prompts, responses, …) takes by name; None if it takes all, or does not tell.

    One that takes `**columns` and reads some of them alone may say so by an attribute `reads_columns`.
    """
    if (declared := getattr(function, "reads_columns", None)) is not None:
        return set(declared)
    try:
        parameters = inspect.signature(bare(function)).parameters.values()
    except (TypeError, ValueError):
        return None
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_all else {parameter.name for parameter in list(parameters)[2:]}


def columns_for(function: Any, columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Those of the columns that the function names, or all for one that takes **columns."""
    wanted = named_columns(function)
    return columns if wanted is None else {name: rows for name, rows in columns.items() if name in wanted}


def checked_columns(columns: Mapping[str, Sequence[Any]], num_prompts: int) -> dict[str, list[Any]]:
    """The columns as lists, refused where they have not one value per prompt."""
    if not isinstance(columns, Mapping):
        raise ValueError(f"columns ({columns!r:.80}) must map names to one value per prompt, as a dict does")
    rows: dict[str, list[Any]] = {}
    for name, values in columns.items():
        if not isinstance(name, str):
            raise ValueError(f"columns[{name!r}]: the name must be a string; rewards get columns by keyword")
        if name in ("prompts", "responses", "self"):
            raise ValueError(f"columns[{name!r}] would hide the argument {name!r} of the reward function; rename it")
        if not hasattr(values, "__len__") or isinstance(values, str | Set | Mapping):
            raise ValueError(f"columns[{name!r}] ({values!r:.80}) must be a sequence with one value per prompt")
        # By position: an index into a pandas column is a label, which another row may carry.
        rows[name] = list(values)
        if len(rows[name]) != num_prompts:
            raise ValueError(f"columns[{name!r}] has {len(rows[name])} rows, but there are {num_prompts} prompts")
    return rows


def fresh(value: Any) -> Any:
    """A value with its lists and dicts copied, all the way down: a reward function may write into what it gets."""
    copied = [value]
    unread: list[Any] = [copied]  # copies whose contents are still the original's; no recursion, however deep they lie
    while unread:
        parts = unread.pop()
        for key, part in list(parts.items() if type(parts) is dict else enumerate(parts)):
            if type(part) in (list, dict):
                parts[key] = part.copy()
                unread.append(parts[key])
    return copied[0]
