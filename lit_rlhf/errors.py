"""The error that a user can mend (the CLI prints its message alone, without a traceback), and what it is raised for."""

import math
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

# Types of values: what is of them, and how they are called. First those of single values.
PLAIN: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: ((str, PathLike), "text"),
    NoneType: (NoneType, "null"),
}
# Those of values that hold others.
NESTED: dict[Any, tuple[Any, str]] = {
    list: ((list, tuple), "a list"),
    tuple: ((list, tuple), "a list"),
    dict: (Mapping, "a mapping"),
    Callable: (Callable, "a function"),
}


UNREADABLE = "has letters that this system's encoding lacks; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"


class UserError(ValueError):
    """Bad input or configuration; says what came, what was expected and what to do."""


def looks_like_a_path(name: str) -> bool:
    """Whether a name that is no file or folder was meant as one, rather than as `owner/name` on a hub."""
    in_a_folder = "/" in name and Path(name).expanduser().parent.is_dir()
    return in_a_folder or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def one_line(said: object, most: int = 120) -> str:
    """What a message shows of a value, or of another message: one line, cut where it is long."""
    line = " ".join(str(said).split())
    return line if len(line) <= most else f"{line[:most]}..."


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse an option whose value does not hold to what is expected of it."""
    if not holds:
        raise UserError(f"{name} ({one_line(value)}) must be {expected}")


def require_alike(given: Any, mine: Any, name: str, needed: Collection[str] = ()) -> None:
    """Refuse a state that is of another kind than one's own, before anything is computed with it.

    Args:
        given: as it was stored.
        mine: what it is to take the place of: mappings of the same names, lists as long, numbers where it has numbers,
            tensors of the shape; None takes anything.
        name: of the state, for the message.
        needed: names that a mapping must have; others may be missing, as in a state of an older version.

    Raises:
        UserError: says where, what was expected and what was found.
    """
    kinds: dict[type, tuple[str, bool]] = {
        bool: ("true or false", isinstance(given, bool)),
        int: ("a whole number from 0 on", type(given) is int and given >= 0),
        float: ("a finite number", isinstance(given, Real) and type(given) is not bool and math.isfinite(given)),
        str: ("text", isinstance(given, str)),
    }
    if isinstance(mine, Mapping):
        lost = [key for key in needed if not isinstance(given, Mapping) or key not in given]
        expected, right = f"a mapping with {', '.join(map(str, lost))}" * bool(lost) or "a mapping", not lost
        right = right and isinstance(given, Mapping)
    elif isinstance(mine, list | tuple):
        expected, right = f"a list of {len(mine)}", isinstance(given, list | tuple) and len(given) == len(mine)
    elif hasattr(mine, "shape"):
        expected, right = f"a tensor of {tuple(mine.shape)}", getattr(given, "shape", None) == mine.shape
    else:
        expected, right = kinds.get(type(mine), ("", True))
    if not right:
        raise UserError(f"{name}: expected {expected}, found {type(given).__name__} ({one_line(repr(given), 60)})")
    keys = range(len(mine)) if isinstance(mine, list | tuple) else mine if isinstance(mine, Mapping) else ()
    for key in keys:
        if not isinstance(mine, Mapping) or key in given:
            require_alike(given[key], mine[key], f"{name}[{key!r}]")


def damaged(file: object, part: str) -> str:
    """How a message about a part of a checkpoint begins that is not what a run writes."""
    return f"ckpt_path: {file} is damaged, so take an older one: its {part}"


def require_types(owner: Any, given: Mapping[str, Any]) -> None:
    """Refuse arguments that their owner does not take: an array for a number, a word that is none of its `Literal`.

    Args:
        owner: a constructor, or a dataclass.
        given: its arguments by name, perhaps among others.

    Raises:
        UserError: names the first of them.
    """
    require_kinds(hints_of(owner), given)


def hints_of(owner: Any) -> dict[str, Any]:
    """The annotations of a constructor or a dataclass; none where they are imported for type checkers alone."""
    try:
        return get_type_hints(owner)
    except (NameError, TypeError, AttributeError):
        return {}


def require_kinds(hints: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """As `require_types`, of annotations by name."""
    for name, hint in hints.items():
        if name in given:
            _require_kind(hint, given[name], name)


def _require_kind(hint: Any, value: object, name: str) -> None:
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds = [kind for part in parts if (kind := _kind(part)) is not None]
    if len(kinds) < len(parts):  # a value does not tell
        return
    *others, last = [word for _, words in kinds for word in words]
    fitting = [part for part, (kind, _) in zip(parts, kinds, strict=True) if _is(value, kind)]
    require(bool(fitting), name, repr(value), f"{', '.join(others)} or {last}" if others else last)
    for key, item_hint, item in _items(fitting[0], value):
        _require_kind(item_hint, item, f"{name}[{key!r}]")


def _kind(hint: Any) -> tuple[Any, tuple[str, ...]] | None:
    """What is of an annotation, a type or words of a `Literal`, and how it is called; None if a value does not tell."""
    origin = get_origin(hint)
    if origin is Literal:
        return frozenset(get_args(hint)), tuple(map(str, get_args(hint)))
    if origin in NESTED or hint in PLAIN:
        kind, word = NESTED.get(origin) or PLAIN[hint]
        return kind, (word,)
    is_class = isinstance(hint, type) and hint is not Any and not getattr(hint, "_is_protocol", False)
    return (hint, (hint.__name__,)) if is_class and origin is None else None


def _is(value: object, kind: Any) -> bool:
    if isinstance(kind, frozenset):
        return isinstance(value, str) and value in kind
    if kind is bool:
        return type(value).__name__ in ("bool", "bool_")  # NumPy's too, which is not read for that
    return isinstance(value, kind) and not isinstance(value, bool)


def _items(hint: Any, value: Any) -> list[tuple[Any, Any, Any]]:
    """What a value holds that its annotation speaks of: where, by which annotation, and what."""
    origin, hints = get_origin(hint), get_args(hint)
    if origin is dict and hints:
        return [(key, hints[1], item) for key, item in value.items()]
    if origin in (list, tuple) and hints:
        hints = hints if origin is tuple and ... not in hints else hints[:1] * len(value)
        return [(at, *pair) for at, pair in enumerate(zip(hints, value, strict=False))]  # how many, their owner says
    return []


@contextmanager
def named_by(option: str) -> Iterator[None]:
    """Say which option names what an error is about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def place_of(error: Exception) -> str:
    """Where in the file of the function that was called an error came from; nothing if the call itself failed."""
    _, *frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    return f", in {own[-1].filename}:{own[-1].lineno}" if own else ""
