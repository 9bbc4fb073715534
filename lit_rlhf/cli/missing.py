"""What a command line lacks: a config, a part of the run, an argument of a class that it names."""

import inspect
import re
from collections.abc import Callable, Sequence

from lit_rlhf.cli.commands import COMMANDS, RUNS, WRITTEN
from lit_rlhf.cli.unknown_options import class_of
from lit_rlhf.cli.yaml_files import places, typed_places
from lit_rlhf.data.checks import DATA_MODULES

REQUIRED = re.compile(r"arguments are required: ([\w.]+(?:, [\w.]+)*)")
OF_LIGHTNING = {  # options of the Trainer -> where its own classes for them are, which names need not begin with
    "callbacks": "lightning.pytorch.callbacks",
    "logger": "lightning.pytorch.loggers",
    "plugins": "lightning.pytorch.plugins",
    "profiler": "lightning.pytorch.profilers",
    "strategy": "lightning.pytorch.strategies",
}
CLASS_NAME = re.compile(r"(?<![\w.])(?:\w+\.)*[A-Z]\w*(?![\w.])")
CONFIG = "--config=configs/{}.yaml"


def missing(message: str, typed: Sequence[str], in_use: Callable[[str], str | None]) -> str | None:
    """What is missing, and what to write; None where a message says no such thing.

    Args:
        message: of jsonargparse, which names what it requires.
        typed: the command line.
        in_use: import path of the class of model or data that the command line is about.
    """
    found = REQUIRED.search(message)
    if found is None:
        return None
    names = [re.sub(rf"^({'|'.join(RUNS)})\.", "", name) for name in found[1].split(", ")]
    command = next((word for word in typed if word in COMMANDS), "fit")
    several = ", ".join(names[:-1])
    lacks = f"{several and f'{several} and '}{names[-1]} {'is' if len(names) == 1 else 'are'} missing"
    if command in WRITTEN:
        return f"{lacks}; write {WRITTEN[command]}"
    if not {"model", "data"}.isdisjoint(names):
        return missing_part(command, in_use("model"), in_use("data"))
    owner = class_with(names[0], typed)
    if owner is None:
        return f"{lacks}: give it by the option of that name, or in a config"
    option, path = owner
    short = path.rpartition(".")[2] if path.startswith("lightning.") else path
    example = f"{{class_path: {short}, init_args: {{{', '.join(f'{name}: ...' for name in names)}}}}}"
    return f"{f'{option}: ' if option else ''}{path}: {lacks}: write {example}"


def missing_part(command: str, model: str | None, data: str | None) -> str:
    """Which of model and data is missing, and which of them suit what is there.

    Args:
        command: of the run.
        model: import path of the class of the model, if one is named.
        data: likewise.
    """
    if model is None and data is None:
        return f"there is neither model nor data; name a config, as in lit-rlhf {command} {CONFIG.format('sft')}"
    if model is None:
        kind = next((kind for kind, name in DATA_MODULES.items() if name == str(data).rpartition(".")[2]), None)
        suited = models_of(kind)
        which = f"; {str(data).rpartition('.')[2]} is for {', '.join(suited)}" if suited else ""
        return f"model is missing{which}; add one, as in --model=lit_rlhf.{(suited or ['SFT'])[0]}, or a config"
    name = model.rpartition(".")[2]
    suited_data = DATA_MODULES.get(getattr(class_of(model), "learns_from", ""))
    if suited_data is None:
        return f"data is missing; add --data=... with the data module of {name}, or name a config by --config"
    return f"data is missing; {name} learns from a {suited_data}: add --data=lit_rlhf.{suited_data}, or name a config"


def models_of(kind: str | None) -> list[str]:
    """Names of our classes that learn from rows of a kind."""
    import lit_rlhf

    public = {name: getattr(lit_rlhf, name) for name in lit_rlhf.__all__}
    return [name for name, cls in public.items() if kind is not None and getattr(cls, "learns_from", None) == kind]


def class_with(argument: str, typed: Sequence[str]) -> tuple[str, str] | None:
    """The option that names a class which cannot do without an argument, and this class; None if none is found."""
    packages = ["", *(f"{package}." for package in OF_LIGHTNING.values())]
    for option, word in [*typed_places(typed), *((str(place), place.value) for place in places(typed))]:
        for path in [f"{package}{name}" for name in CLASS_NAME.findall(word or "") for package in packages]:
            kind = class_of(path)
            given = inspect.signature(kind).parameters.get(argument) if inspect.isclass(kind) else None
            if given is not None and given.default is inspect.Parameter.empty:
                return option, path
    return None
