"""The parser of the command line: answers a mistake with what is wrong and the nearest that is right."""

import difflib
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import chdir
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NoReturn, get_args

import yaml
from jsonargparse import auto_cli
from lightning.fabric.utilities.enums import LightningEnum
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser

from lit_rlhf.cli.commands import OF_CONFIGS, RUNS, did_you_mean
from lit_rlhf.cli.imports import names_in, path_of_file
from lit_rlhf.cli.missing import OF_LIGHTNING, missing
from lit_rlhf.cli.mistakes import LONGEST
from lit_rlhf.cli.other_names import name_here
from lit_rlhf.cli.ranks import tell
from lit_rlhf.cli.unknown_options import class_of, hint, option_paths, settings_in
from lit_rlhf.cli.wording import OPTION, below_a_value, no_value, wrong_value
from lit_rlhf.cli.yaml_files import config_files, place_of_option, places, typed_places
from lit_rlhf.data.checks import DATA_MODULES
from lit_rlhf.errors import UserError, hints_of, one_line

# jsonargparse lists every type that a value failed to be, and repeats the whole value.
NOISE = (
    "Does not validate against",
    "- Does not validate against",
    "- Expected a path but",
    "Subtypes:",
    "Errors:",
    "- Expected a <class 'NoneType'>",
    "Given value type",
    "Given value: Namespace",
    "Given value: Nested",
)

UNKNOWN = re.compile(
    r"Option '([^']+)' is not accepted|unrecognized arguments: --([^=\s]+)|does not accept option '([^']+)'"
)
UNNAMED = 'in "<unicode string>", '  # of YAML that is written out on the command line
NO_MAPPING = re.compile(r"Parser key \"([\w.]+)\":\s+Unable to load config '([^']*)'")
NO_PATH = re.compile(r'Parser key "([^"]+)":.*Expected a dot import path string: ([^\n]+)', re.S)
ODD_PATH = re.compile(r'Parser key "([^"]+)":.*Unexpected import path format: ([^\n]+)', re.S)
NOT_IN_MODULE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
OURS = re.compile(r"lit_rlhf(?:\.\w+)*\.(\w+)")
EXAMPLES = {"model": "lit_rlhf.SFT", "data": "lit_rlhf.SFTDataModule"}


# Defaults of Lightning's that stand for a text, such as that of Timer's interval, are written as this text.
yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, member: dumper.represent_str(member.value))


class Parser(LightningArgumentParser):
    """Answers a mistake with what is wrong, not with two screens of usage; takes no abbreviated option."""

    typed: ClassVar[list[str]] = []  # the whole command line: a message names an option as it stands there

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    folder: ClassVar[Path] = Path()  # that it was typed in; jsonargparse reads a config from within the config's own

    @classmethod
    def begin(cls, argv: list[str]) -> None:
        """Note a command line that is about to be parsed, for what is to be said of it."""
        cls.typed, cls.folder = argv, Path.cwd()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and where to look; exit with status 2."""
        with chdir(self.folder):
            said, hint = self.answer(message), self.hint
        tell(f"error: {one_line(said, LONGEST)}\n{hint}")
        raise SystemExit(2)

    def answer(self, message: str) -> str:
        """What to say in place of what jsonargparse says."""
        lines = [line for line in message.splitlines() if not line.strip().startswith(NOISE) and line.strip()]
        said = "\n".join(lines)
        if unknown := UNKNOWN.search(message):
            said = self.unknown_option(next(filter(None, unknown.groups())))
        elif told := no_value(message, self.typed) or moved_path(message, self.typed):
            said = told
        elif file := self.path_as_file(message):
            said = file
        elif absent := NOT_IN_MODULE.search(message):
            option = "".join(f"{self.as_typed(key, absent[0])}: " for key in OPTION.findall(message)[-1:])
            said = f"{option}{absent[0]}{did_you_mean(absent[2], dir(sys.modules.get(absent[1])))}"
        elif no_path := NO_PATH.search(message):
            option, given = no_path.groups()
            settings = settings_in(message)
            wanted = (
                f"a mapping of options, such as '{settings}', or null" if settings else "an import path, module.name"
            )
            near = "" if settings else nearest_path(option, given)
            said = f"{self.as_typed(option, given)}: expected {wanted}, got {given}{near}"
        elif no_mapping := NO_MAPPING.search(message):
            option, given = no_mapping.groups()
            wanted = "expected a mapping, or a YAML file that holds one"
            near = name_here(option, option_paths({"model": class_of(self.in_use("model"))}))
            said = f"{self.as_typed(option)}: {wanted}, got {given or 'empty text'}{near}"
        elif UNNAMED in message:
            said = f"--config: {message.partition(': ')[2].replace(UNNAMED, 'in ')}; name a file, or write YAML"
        elif below := below_a_value(message):
            said = self.unknown_option(below)
            said += "" if ";" in said else f"; {below.rpartition('.')[0]} has no options of its own"
        elif wrong := wrong_value(message, self.as_typed):
            said = wrong
        elif odd := ODD_PATH.search(message):
            said = f"{self.as_typed(*odd.groups())}: expected an import path, module.name, got {odd[2]}"
        elif "No module named" in message:
            said += "\nmodules are found in the current folder and among what is installed"
        elif lacking := missing(message, self.typed, self.in_use):
            said = lacking
        return said

    @property
    def hint(self) -> str:
        """Where all options are to be seen."""
        model = f"lit-rlhf fit --model.help {self.in_use('model') or EXAMPLES['model']}"
        return f"For all options: lit-rlhf {self.command} --help, {model}"

    @property
    def command(self) -> str:
        """The command that the options are of; fit where none of a config is given."""
        return next((word for word in self.typed if word in (*RUNS, *OF_CONFIGS)), "fit")

    def in_use(self, part: str) -> str | None:
        """Class path of the model or the data that the command line, or a YAML which it names, is about, if any."""
        given = [(place.option, place.value) for place in places(self.typed)]
        given += [(option.lstrip("-"), value) for option, value in typed_places(self.typed)]
        named = [value for option, value in given if option in (part, f"{part}.class_path") and value]
        module, _, name = named[-1].rpartition(".") if named else ("", "", "")
        return f"{module}.{name}" if hasattr(sys.modules.get(module), name) else None

    def unknown_option(self, name: str) -> str:
        """What to say of an option that is not there."""
        name = name.replace(".init_args", "")
        typed = self.typed_option(name)
        place = None if typed else place_of_option(self.typed, name)
        full = typed or (place.option if place else name)
        owner = full.lstrip("-").split(".")[0]
        model, data = self.in_use("model"), self.in_use("data")
        given = {word.partition("=")[0] for word in self.typed}
        if owner in EXAMPLES and "." in full and given.isdisjoint(("-c", "--config", f"--{owner}")):
            suited = DATA_MODULES.get(getattr(class_of(model), "learns_from", "")) if owner == "data" else None
            example = f"lit_rlhf.{suited}" if suited else EXAMPLES[owner]
            return f"{full}: name a class first, by --config or --{owner}=, such as --{owner}={example}"
        if owner == "model" and model and is_base(pkgutil.resolve_name(model)):
            return f"{full}: {model} is a base that others stand on, not a method; name one, such as lit_rlhf.DPO"
        same = [one for one in places(self.typed) if place is not None and one.option == full]
        for early in [one for one in same if self.naming_later(owner, one.file)][:1]:
            return (
                f"{early.file}, line {early.line}: {full} stands before the config that names a class for {owner}; "
                f"give --config={early.file} after that one"
            )
        kinds = {"trainer": Trainer, "model": class_of(model), "data": class_of(data)}
        near = hint(full, kinds, option_names(self, model, data))
        return f"{f'{place.file}, line {place.line}: ' if place else ''}there is no option {full}{near}"

    def path_as_file(self, message: str) -> str | None:
        """What to say of an import path that was given as a file, which may have been read as a config; else None."""
        for key in OPTION.findall(message):
            typed, place = self.typed_option(key), place_of_option(self.typed, key)
            given = [arg.partition("=")[2] for arg in self.typed if typed and arg.startswith(f"{typed}=")]
            value = given[-1] if given else place.value if place else None
            odd = any(f"import path {word}: {value}\n" in f"{message}\n" for word in ("format", "string"))
            path = path_of_file(value) if value else None
            if value is not None and (value.endswith(".py") or (odd and path)):
                what = "the file " if value.endswith(".py") else ""
                near = f"such as {path}" if path else "module.name"
                return f"{self.as_typed(key)}: expected an import path, {near}, got {what}{value}"
        return None

    @classmethod
    def typed_option(cls, name: str, value: str | None = None) -> str | None:
        """An option as it stands on the command line, perhaps in a mapping; of several as of `place_of_option`."""
        ends = f".{name}"
        found = [
            given
            for given in typed_places(cls.typed)
            if given[0].replace("--", ".").replace(".init_args", "").endswith(ends)
        ]
        alike = [given for given in found if value is not None and given[1] == value]
        return (alike or found)[-1][0] if found else None

    def naming_later(self, part: str, file: Path) -> list[Path]:
        """The configs that name a class for model or data, where none does up to a file."""
        order = list(config_files(self.typed))
        names = (part, f"{part}.class_path")
        named = [place.file for place in places(self.typed) if place.option in names and place.value]
        return [] if file not in order or set(named) & set(order[: order.index(file) + 1]) else named

    @classmethod
    def naming(cls, path: str) -> str:
        """The option that names an import path, as the start of a message; empty if none is found that does."""
        typed = [option for option, value in typed_places(cls.typed) if value == path]
        found = typed or [str(place) for place in places(cls.typed) if place.value == path]
        return f"{found[0]}: " if found else ""

    @classmethod
    def as_typed(cls, name: str, value: str | None = None) -> str:
        """An option as it stands on the command line, or its place in a config; by its own name where it is in none."""
        return cls.typed_option(name, value) or str(place_of_option(cls.typed, name, value) or name)


class Program(Parser):
    """Of one function alone, without a model to name."""

    @property
    def hint(self) -> str:
        """Where all options are to be seen."""
        return f"For all options: {self.prog} --help"

    def unknown_option(self, name: str) -> str:
        """What to say of an option that is not there, where there is one of this name in a part."""
        options = [option for action in self._actions for option in action.option_strings]
        homes = [option for option in options if option.endswith(f".{name}")]
        return f"there is no option --{name}; write {homes[0]}" if homes else super().unknown_option(name)


def with_bare_flags(function: Callable[..., Any], argv: Sequence[str]) -> list[str]:
    """A command line on which `--merge` alone, where it is true or false, says true."""
    flags = {f"--{name}" for name, hint in hints_of(function).items() if bool in (hint, *get_args(hint))}
    return [
        f"{argument}=true" if argument in flags and after.startswith("-") else argument
        for argument, after in pairwise([*argv, "--"])
    ]


def command(function: Callable[..., None]) -> None:
    """A function as a program of its own; what the user can mend is said in one line, with exit status 2."""
    try:
        auto_cli(function, as_positional=False, parser_class=Program)
    except UserError as error:
        tell(f"error: {error}")
        raise SystemExit(2) from None


def moved_path(message: str, typed: Sequence[str]) -> str | None:
    """What to say of an import path of ours that leads nowhere, but whose last name is known; None of any other."""
    known = public_paths()
    for given in OURS.finditer(message):
        now = None if leads_somewhere(given[0]) else known.get(given[1]) or home_of(given[1])
        if now is not None:
            place = next((f"{place}: " for place in places(typed) if place.value == given[0]), "")
            return f"{place}{given[0]} is not there; write {now}"
    return None


def home_of(name: str) -> str | None:
    """Import path of a class or function of ours that is not public, by its name."""
    ours = Path(__file__).parents[1]
    for file in sorted(ours.rglob("*.py")):
        if re.search(rf"^(?:class|def) {name}\b", file.read_text(encoding="utf-8"), re.M):
            return ".".join((ours.name, *file.relative_to(ours).with_suffix("").parts, name))
    return None


def is_base(kind: Any) -> bool:
    """Whether a class is a module that cannot train."""
    return getattr(kind, "training_step", None) is LightningModule.training_step


def leads_somewhere(path: str) -> bool:
    """Whether an import path can be imported."""
    try:
        pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError):
        return False
    return True


def public_paths() -> dict[str, str]:
    """Import path of each of our public names."""
    import lit_rlhf
    from lit_rlhf import callbacks, losses, oracle

    packages = (oracle, callbacks, losses, lit_rlhf)
    return {name: f"{package.__name__}.{name}" for package in packages for name in package.__all__}


def nearest_path(option: str, given: str) -> str:
    """The import path of ours that a name may stand for; where none is near, the losses if it was to be one."""
    from lit_rlhf import losses

    last = option.rpartition(".")[2]
    if last in OF_LIGHTNING and (meant := nearest_of_lightning(OF_LIGHTNING[last], given)):
        return f"; did you mean {meant}?"
    if (names := names_in(given)) is not None:
        return f", which is a module; name what is meant in it{f', such as {given}.{names[0]}' if names else ''}"
    paths = public_paths()
    if near := difflib.get_close_matches(given, paths, n=1, cutoff=0.7):
        return f"; did you mean {paths[near[0]]}?"
    of_pairs = [n for n in losses.__all__ if "chosen_logprobs" in inspect.signature(getattr(losses, n)).parameters]
    return f"; lit_rlhf.losses has {', '.join(of_pairs)}" if option == "loss" else ""


def nearest_of_lightning(package: str, given: str) -> str | None:
    """The class in a package of Lightning's that a name may stand for, such as CSVLogger for csv, if one is near."""
    names = {name.lower(): name for name in import_module(package).__all__}
    plain = given.replace("_", "").lower()
    near = [name for name in names if plain and name.startswith(plain)]
    near += difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    return names[near[0]] if near else None


def option_names(parser: LightningArgumentParser, model: str | None, data: str | None) -> set[str]:
    """Last parts of the options that this parser, the Trainer, and the classes a YAML may name have.

    Where the model is one of ours, those of other models are none; likewise those of other data.
    """
    import lit_rlhf

    public = {f"lit_rlhf.{name}": getattr(lit_rlhf, name) for name in lit_rlhf.__all__}
    for named, base in ((model, LightningModule), (data, LightningDataModule)):
        others = [path for path, cls in public.items() if inspect.isclass(cls) and issubclass(cls, base)]
        for path in others if named in others else ():
            if path != named:
                del public[path]
    classes = {base for cls in [Trainer, *public.values()] if inspect.isclass(cls) for base in cls.__mro__}
    constructors = [vars(cls)["__init__"] for cls in classes if inspect.isfunction(vars(cls).get("__init__"))]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    actions = {option.split(".")[-1].lstrip("-") for action in parser._actions for option in action.option_strings}
    return {name.replace("-", "_") for name in names | actions}
