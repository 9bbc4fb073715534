"""Where options live, for what is to be said of one that is not there."""

import dataclasses
import difflib
import inspect
import pkgutil
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, get_args

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from lit_rlhf.cli.commands import did_you_mean
from lit_rlhf.cli.other_names import name_here
from lit_rlhf.errors import hints_of

MOST = 3  # places that are named
TOP = ("seed_everything", "ckpt_path")  # options of the run itself
MOST_OWN = 10  # options of a class that are listed


def option_paths(kinds: Mapping[str, Any]) -> list[str]:
    """Names of the options of some classes, those of settings that they take included.

    Args:
        kinds: classes by the name of the option that they stand for, such as model.
    """
    return [path for name, kind in kinds.items() for path in _paths(kind, name)]


def hint(option: str, kinds: Mapping[str, Any], others: Collection[str]) -> str:
    """What to say beside that there is no such option; perhaps nothing.

    Args:
        option: with all that it stands below.
        kinds: as of `option_paths`.
        others: further names of options, whose place depends on what a config names.
    """
    name = option.lstrip("-")
    (first, *below), last = name.split("."), name.rpartition(".")[2]
    paths = [*option_paths(kinds), *TOP]
    if below and name in paths:  # options are read in their order
        return f" yet: write it after --{first}, which names the class that has it"
    if near := name_here(option, paths):
        return near
    if below and first not in kinds:  # a part that there is not, or that is elsewhere
        homes = [path for path in paths if path.endswith((f".{first}", f".{name}"))]
        near = f"; there is {homes[-1]}" if homes else ""
        near = near or ("" if first in others else did_you_mean(first, {*kinds, *others}, cutoff=0.7))
    elif not below and last in others:  # it is elsewhere
        there = [path for path in paths if path.endswith(f".{last}")]
        where = " or ".join(there[:MOST]) or "it below model, data or trainer"
        near = f"; {last} is an option of a part: write {where}"
    kind = kinds.get(first) if len(below) == 1 else None
    decided = set_by(kind, last) if first == "model" else ""
    if near or (not decided and (near := whereabouts(option, paths, others))):
        return near
    having = [] if decided or kind is None else classes_with(last, kind)
    return (
        f"; {' and '.join(having)} {'has' if len(having) == 1 else 'have'} it" if having else decided + of_its_own(kind)
    )


def classes_with(name: str, kind: type) -> list[str]:
    """The first of our classes, of a class's sort, that have an option."""
    import lit_rlhf

    base = LightningDataModule if issubclass(kind, LightningDataModule) else LightningModule
    public = [getattr(lit_rlhf, name) for name in lit_rlhf.__all__]
    return [cls.__name__ for cls in public if issubclass(cls, base) and name in options_of(cls)][:MOST]


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


def options_of(kind: type) -> list[str]:
    """Names of the arguments that a class takes from a config: what it hands to its bases by itself is not among them.

    Args:
        kind: of the signatures that jsonargparse reads.
    """
    added = ArgumentParser().add_class_arguments(kind, "of", fail_untyped=False)
    return list(dict.fromkeys(name.split(".")[1] for name in added))


def set_by(kind: Any, name: str) -> str:
    """That a class decides by itself what its bases have an option for; nothing of any other name."""
    if not inspect.isclass(kind) or name in options_of(kind):
        return ""
    constructors = [vars(base).get("__init__") for base in inspect.getmro(kind)]
    handed = [inspect.signature(made).parameters for made in constructors if inspect.isfunction(made)]
    if any(name in parameters for parameters in handed):
        return f"; {kind.__name__} sets it by itself"
    return f"; {kind.__name__} has one loss" if name == "loss" else ""


def of_its_own(kind: Any) -> str:
    """The options that a class has beside those of its bases; nothing where they are none, or many."""
    constructor = vars(kind).get("__init__") if inspect.isclass(kind) else None
    named = inspect.signature(constructor).parameters if inspect.isfunction(constructor) else {}
    own = [name for name in named if name != "policy" and name in options_of(kind)]
    return f"; its own options are {', '.join(own)}" if 0 < len(own) <= MOST_OWN else ""


def _paths(kind: Any, above: str) -> Iterator[str]:
    if not inspect.isclass(kind):
        return
    hints: dict[str, Any] = {}
    for base in reversed(inspect.getmro(kind)):
        constructor = vars(base).get("__init__")
        hints |= hints_of(constructor) if inspect.isfunction(constructor) else {}
    for name in options_of(kind):
        yield f"{above}.{name}"
        hint = hints.get(name)
        for part in (hint, *get_args(hint)):
            if inspect.isclass(part) and dataclasses.is_dataclass(part):
                yield from _paths(part, f"{above}.{name}")
