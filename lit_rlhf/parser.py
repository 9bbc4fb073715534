"""The parser of the command line: answers a mistake with what is wrong and the nearest that is right."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

HINT = "For all options: lit-rlhf fit --help, lit-rlhf fit --model.help lit_rlhf.DPO, lit-rlhf compare --help"
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

CLASS_GIVEN = ("--config", "-c", "--model=", "--data=")
EXAMPLES = {"model": "lit_rlhf.SFT", "data": "lit_rlhf.SFTDataModule"}


class Parser(LightningArgumentParser):
    """Answers a mistake with what is wrong, not with two screens of usage; takes no abbreviated option."""

    typed: ClassVar[list[str]] = []  # the whole command line: a message names an option as it stands there

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and where to look; exit with status 2."""
        lines = [line for line in message.splitlines() if not line.strip().startswith(NOISE) and line.strip()]
        unknown = re.search(r"Option '([^']+)' is not accepted|unrecognized arguments: --([^=\s]+)", message)
        if unknown is not None:
            name = unknown[1] or unknown[2]
            full = next((arg.split("=")[0] for arg in self.typed if arg.split("=")[0].endswith(name)), name)
            lines = [f"there is no option {full}{did_you_mean(name.split('.')[-1], option_names(self), cutoff=0.7)}"]
            owner = full.lstrip("-").split(".")[0]
            if (
                owner in ("model", "data")
                and "." in full
                and not any(arg.startswith(CLASS_GIVEN) for arg in self.typed)
            ):
                lines = [f"{full}: name a class first, by --config or --{owner}=, such as --{owner}={EXAMPLES[owner]}"]
        print("error: " + "\n".join(lines) + f"\n{HINT}", file=sys.stderr)
        raise SystemExit(2)


def did_you_mean(given: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The nearest name as a question, or nothing."""
    near = difflib.get_close_matches(given, list(names), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def option_names(parser: LightningArgumentParser) -> set[str]:
    """Last parts of the options that this parser, the Trainer, and the classes a YAML may name have."""
    import lit_rlhf

    public = [getattr(lit_rlhf, name) for name in lit_rlhf.__all__]
    classes = {base for cls in [Trainer, *public] if inspect.isclass(cls) for base in cls.__mro__}
    constructors = [vars(cls)["__init__"] for cls in classes if inspect.isfunction(vars(cls).get("__init__"))]
    names = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    actions = {option.split(".")[-1].lstrip("-") for action in parser._actions for option in action.option_strings}
    return {name.replace("-", "_") for name in names | actions}
