"""Where options live, for what is to be said of one that is not there."""

import dataclasses
import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, get_args

from lit_rlhf.cli.commands import did_you_mean
from lit_rlhf.errors import hints_of

MOST = 3  # places that are named
STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def option_paths(kinds: Mapping[str, Any]) -> list[str]:
    """Names of the options of some classes, those of settings that they take included.

    Args:
        kinds: classes by the name of the option that they stand for, such as model.
    """
    return [path for name, kind in kinds.items() for path in _paths(kind, name)]


def whereabouts(option: str, paths: Iterable[str], others: Iterable[str]) -> str:
    """What to say beside that there is no such option: where one of its name is, or the nearest name; perhaps nothing.

    Args:
        option: with all that it stands below.
        paths: of the options that there are.
        others: further names of options, whose place depends on what a config names.
    """
    parent, _, last = option.lstrip("-").rpartition(".")
    there = list(paths)
    beside = [path.rpartition(".")[2] for path in there if path.rpartition(".")[0] == parent]
    if homes := [path for path in there if path.rpartition(".")[2] == last]:
        near = did_you_mean(last, beside, cutoff=0.8)
        return f"; there is {' or '.join(homes[:MOST])}" if not near else f"{near[:-1]}, or {homes[0]}?"
    if meant := [name for name in beside if len(last) > 1 and "".join(word[:1] for word in name.split("_")) == last]:
        return f"; did you mean {meant[0]}?"  # as lr is written for learning_rate
    elsewhere = {path.rpartition(".")[2]: path for path in reversed(there)}
    if near := did_you_mean(last, beside, cutoff=0.7):
        return near
    named = difflib.get_close_matches(last, {*elsewhere, *others} - {last}, n=1, cutoff=0.7)
    return f"; did you mean {elsewhere.get(named[0], named[0])}?" if named else did_you_mean(last, beside, cutoff=0.65)


def class_of(path: str | None) -> Any:
    """The class that an import path leads to, if it does."""
    try:
        return pkgutil.resolve_name(path) if path else None
    except (ImportError, AttributeError, ValueError):
        return None


def settings_in(message: str) -> str | None:
    """An example of the options of the settings that a value was refused as by jsonargparse, if it was to be some."""
    for path in re.findall(r"<class '([\w.]+)'>", message):
        kind = class_of(path)
        if dataclasses.is_dataclass(kind):
            first = dataclasses.fields(kind)[0]
            return f"{{{first.name}: {first.default}}}"
    return None


def _paths(kind: Any, above: str) -> Iterator[str]:
    for base in inspect.getmro(kind) if inspect.isclass(kind) else ():
        constructor = vars(base).get("__init__")
        if not inspect.isfunction(constructor):
            continue
        hints = hints_of(constructor)
        parameters = inspect.signature(constructor).parameters.values()
        for name in [given.name for given in parameters if given.kind not in STARRED and given.name != "self"]:
            yield f"{above}.{name}"
            hint = hints.get(name)
            for part in (hint, *get_args(hint)):
                if inspect.isclass(part) and dataclasses.is_dataclass(part):
                    yield from _paths(part, f"{above}.{name}")
