"""What jsonargparse lets through although nothing can be made of it: null for anything, anything for a part."""

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule

from lit_rlhf.cli.wording import TYPES

PLAIN = (str, int, float, bool, NoneType)
PARTS = (LightningModule, LightningDataModule)  # of a run: no argument of one is another


def wrong_values(config: Namespace, groups: Mapping[str, type]) -> Iterator[tuple[str, object, str]]:
    """Options with a value that they cannot have: their names, what was given, what is expected.

    Args:
        config: of a run, parsed.
        groups: classes whose arguments stand in it without a `class_path`, by name: the Trainer, our callbacks.
    """
    for name, kind in groups.items():
        yield from _of_arguments(config.get(name), kind, name)
    for name in ("model", "data"):
        given = config.get(name)
        if isinstance(given, Namespace):
            yield from _of_value(given, name)


def _of_value(value: object, option: str) -> Iterator[tuple[str, object, str]]:
    """Of a class that is named by its path, or of those in a list or a mapping."""
    if isinstance(value, Namespace) and "class_path" in value:
        kind = _resolved(value.class_path)
        if option not in ("model", "data") and inspect.isclass(kind) and issubclass(kind, PARTS):
            yield option, value.class_path, "the import path of a function"
        elif kind is not None:
            yield from _of_arguments(value.get("init_args", Namespace()), kind, option)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _of_value(part, option)
    elif isinstance(value, dict):
        for name, part in value.items():
            yield from _of_value(part, f"{option}.{name}")


def _of_arguments(given: object, kind: type, option: str) -> Iterator[tuple[str, object, str]]:
    if not isinstance(given, Namespace):
        yield option, given, f"a mapping of the arguments of {kind.__name__}"
        return
    hints = argument_types(kind)
    for name in given.__dict__:
        value, hint = given[name], hints.get(name, Any)
        if value is None and not may_be_null(hint):
            yield f"{option}.{name}", None, type_in_words(hint)
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _of_arguments(value, hint, f"{option}.{name}")
        else:
            yield from _of_value(value, f"{option}.{name}")


def argument_types(kind: Any) -> dict[str, Any]:
    """Types of a constructor's arguments, those that it hands on to its bases included; Any where none is written."""
    types: dict[str, Any] = {}
    for base in reversed(inspect.getmro(kind) if inspect.isclass(kind) else ()):
        constructor = vars(base).get("__init__")
        if inspect.isfunction(constructor):
            parameters = inspect.signature(constructor).parameters
            try:
                hints = get_type_hints(constructor)
            except (NameError, TypeError, AttributeError):  # types that are imported for type checkers alone
                hints = {}
            for name, parameter in parameters.items():
                null = parameter.default is None
                types[name] = Any if null else hints.get(name, Any)
    return types


def may_be_null(hint: Any) -> bool:
    """Whether None is of a type."""
    if get_origin(hint) in (Union, UnionType):
        return any(may_be_null(part) for part in get_args(hint))
    return hint in (Any, None, NoneType, object) or not (isinstance(hint, type) or get_args(hint))


def type_in_words(hint: Any) -> str:
    """What a value of a type is, as `wording` says it."""
    if get_origin(hint) in (Union, UnionType):
        return ", or ".join(dict.fromkeys(type_in_words(part) for part in get_args(hint)))
    choices = [value for value in get_args(hint) if isinstance(value, str)]
    if choices:
        return " or ".join(map(repr, choices))
    name = getattr(get_origin(hint) or hint, "__name__", str(hint))
    return TYPES.get(name, f"a {name}").format("...")


def _resolved(path: str) -> Any:
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return None


def option_of(kind: Any, arguments: Mapping[str, Any], config: Any, above: str = "") -> str | None:
    """The option by which a config names a class, below those of the run's parts; None if none does.

    Args:
        kind: the class.
        arguments: that it is made with; of several of one class, the option is that with these.
        config: parsed, or a part of it.
        above: where that part stands.
    """
    if isinstance(config, Namespace) and "class_path" in config:
        given = config.get("init_args", Namespace())
        plain = {name: value for name, value in arguments.items() if isinstance(value, PLAIN)}
        alike = all(given.get(name) == value for name, value in plain.items())
        if above not in ("model", "data") and alike and _resolved(config.class_path) is kind:
            return above
        return option_of(kind, arguments, given, above)
    if isinstance(config, list | tuple):
        found = (option_of(kind, arguments, part, above) for part in config)
    elif isinstance(config, Namespace | dict):
        parts = config.__dict__ if isinstance(config, Namespace) else config
        found = (option_of(kind, arguments, part, f"{above}.{name}".lstrip(".")) for name, part in parts.items())
    else:
        return None
    return next(filter(None, found), None)
