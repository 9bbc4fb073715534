"""A module's constructor arguments as plain values, for checkpoints and loggers, and back.

They look as in a YAML: a function is its import path, a settings dataclass the mapping of its fields, any other object
`{class_path, init_args}`. So checkpoints hold no pickled code. Nor do they choose what code is called: where the
annotation of an argument asks for a function, it is one of `lit_rlhf.losses`; where it asks for an object, that is of a
class of this library. Others are for the caller to pass, and nothing is imported.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from lit_rlhf.errors import UserError, one_line

OURS = __name__.partition(".")[0] + "."
FUNCTIONS = f"{OURS}losses."  # those that are chosen by name
NEVER_STORED = ("trust_remote_code",)  # who reads a checkpoint decides whether to trust
UNKNOWN = "not stored"  # key of what has no plain form


def plain(value: Any) -> Any:
    """A value of the constructor in its plain form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, partial) and not value.args:
        return {"partial": plain(value.func), "keywords": plain(value.keywords)}
    if inspect.isfunction(value) or inspect.isclass(value):
        path = f"{value.__module__}.{value.__qualname__}"
        return path if found(path) is value else {UNKNOWN: path}
    names, held = list(inspect.signature(type(value).__init__).parameters)[1:], attributes(value)
    if held.keys() >= set(names):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        return {"class_path": path, "init_args": {name: plain(held[name]) for name in names}}
    return {UNKNOWN: f"{value!r:.100}"}


def attributes(value: object) -> dict[str, Any]:
    """What an object holds by name, settings that it keeps together in a dataclass included."""
    own = getattr(value, "__dict__", {})
    together = [part for part in own.values() if is_dataclass(part)]
    return {field.name: getattr(part, field.name) for part in together for field in fields(part)} | own


def plain_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments as a checkpoint keeps and a logger shows them."""
    return {name: plain(value) for name, value in arguments.items() if name not in NEVER_STORED}


def flat(value: Any, name: str) -> dict[str, Any]:
    """A plain value by the names that a command line has for its parts: kl.init_args.kl_coef -> kl.kl_coef."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    parts = (flat(part, name if key == "init_args" else f"{name}.{key}") for key, part in value.items())
    return {key: part for held in parts for key, part in held.items()}


def differing(given: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """By name, what two sets of plain arguments have otherwise: first there, then here.

    Args:
        given: those of a checkpoint; what it does not name is as it was.
        mine: likewise.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in mine.keys() & given.keys() - {*NEVER_STORED}:
        before, now = flat(given[name], name), flat(mine[name], name)
        if before.keys() != now.keys():
            found[name] = (given[name], mine[name])
            continue
        found |= {part: (before[part], now[part]) for part in now if before[part] != now[part]}
    return dict(sorted(found.items()))


def settings_of(data: Any) -> dict[str, Any]:
    """What a data module holds of its arguments, as a logger shows it: sources by role, settings, rewards by name.

    Of an object within a reward, such as a judge with a key, the class alone: what a logger gets may go far.
    """
    held = vars(data) if data is not None else {}
    together = {name: value for part in held.values() if is_dataclass(part) for name, value in vars(part).items()}
    sources = {role: [str(source) for source in named or ()] for role, named in held.get("sources", {}).items()}
    terms = held["rewards"].terms if "rewards" in held else ()
    rewards = {term.name: {**reward_settings(term.reward), "weight": term.weight} for term in terms}
    return {**{name: plain(value) for name, value in {**sources, **together}.items()}, "rewards": rewards}


def reward_settings(reward: object) -> dict[str, Any]:
    """Class of a reward and, where it is one of this library, its arguments."""
    form = plain(reward)
    arguments = form.get("init_args", {}) if type(reward).__module__.startswith(OURS) else {}
    named = {
        name: value.get("class_path", value.get(UNKNOWN)) if isinstance(value, dict) else value
        for name, value in arguments.items()
    }
    return {"class_path": f"{type(reward).__module__}.{type(reward).__qualname__}", **named}


def read_arguments(file: Path) -> dict[str, Any]:
    """Constructor arguments in their plain form, as a logger keeps them in its hparams.yaml.

    Raises:
        UserError: it cannot be read, or holds no mapping.
    """
    try:
        arguments = yaml.full_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"hparams_file: {file.absolute()} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(arguments, Mapping):
        raise UserError(f"hparams_file: expected arguments by name in {file.absolute()}, found {one_line(arguments)}")
    return {str(name): value for name, value in arguments.items()}


def restored_arguments(kind: type, stored: Mapping[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a class from their plain form.

    Raises:
        UserError: one has no plain form, or names code that is not this library's.
    """
    hints: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        if base is not object and "__init__" in vars(base):
            with suppress(NameError):  # of a user's own, whose annotations are for type checkers alone
                hints |= get_type_hints(vars(base)["__init__"])
    names = [name for name in stored if name not in NEVER_STORED and not name.startswith("_")]
    return {name: restored(stored[name], hints.get(name), name) for name in names}


def restored(value: Any, expected: Any, name: str) -> Any:
    """A value from its plain form.

    Args:
        value: the plain form.
        expected: the annotation of what it is for.
        name: of the argument, for messages.
    """
    kinds = list(spread(expected))
    classes = [kind for kind in kinds if isinstance(kind, type)]
    settings = [kind for kind in classes if is_dataclass(kind)]
    if isinstance(value, str) and Callable in kinds and str not in kinds:
        return ours(value, FUNCTIONS, name)
    if isinstance(value, list):
        items = (restored(item, expected, name) for item in value)
        return tuple(items) if tuple in kinds and list not in kinds else list(items)
    if not isinstance(value, dict):
        return value
    if value.keys() == {UNKNOWN}:
        raise UserError(f"{name} ({value[UNKNOWN]}) is not in the checkpoint: pass {name}=... as it was in the run")
    if dict in kinds and not settings:
        return value
    if "partial" in value and Callable in kinds:
        return partial(ours(value["partial"], FUNCTIONS, name), **value["keywords"])
    kind: Any = next((kind for kind in settings if value.keys() <= {field.name for field in fields(kind)}), None)
    given = value
    if value.keys() == {"class_path", "init_args"}:
        kind, given = ours(value["class_path"], OURS, name, tuple(classes)), value["init_args"]
    if kind is None and settings:
        raise UserError(f"{name}: {sorted(value)} are not what {settings[0].__name__} takes: pass {name}=... anew")
    if kind is None:
        return value
    hints = get_type_hints(kind.__init__)
    return kind(**{key: restored(item, hints.get(key), name) for key, item in given.items()})


def spread(annotation: Any) -> Iterator[Any]:
    """The classes that an annotation is made of, and `Callable` where it is one of them."""
    origin = get_origin(annotation)
    if origin is Callable:
        yield Callable
    elif origin is not None:
        if isinstance(origin, type):
            yield origin
        for part in get_args(annotation) if origin is not dict else ():
            yield from spread(part)
    else:
        yield annotation


def ours(path: str, room: str, name: str, bases: tuple[type, ...] | None = None) -> Any:
    """The function that an import path names within a room of this library; or the class, where it is to have a base.

    Raises:
        UserError: it names something else, which only the caller may bring.
    """
    value = found(path)
    right = inspect.isfunction(value) if bases is None else inspect.isclass(value) and issubclass(value, bases)
    if not right or not value.__module__.startswith(room):
        raise UserError(
            f"{name}: a checkpoint may name what lies in {room.rstrip('.')} and fits, not {path}; pass {name}=... as "
            "it was in the run"
        )
    return value


def found(path: str) -> Any:
    """What an import path names in a module that is imported already; None if nothing."""
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
