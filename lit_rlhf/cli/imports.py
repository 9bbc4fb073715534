"""Code of the user's that fails while it is imported or made, which jsonargparse does not tell from other values."""

import re
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from lit_rlhf.cli.mistakes import BETWEEN, LONGEST, modules, on_purpose
from lit_rlhf.errors import UserError, one_line

OURS = {"lit_rlhf", "token_mdp"}
PATH = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


def failed_import(value: str) -> str | None:
    """Why the module of an import path in a value cannot be imported, and where; None where all of them can be.

    Args:
        value: as given for an option, perhaps a mapping that names several.
    """
    for path in PATH.findall(value):
        module = path.rpartition(".")[0]
        try:
            if module not in sys.modules and find_spec(module) is not None:
                import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):  # not itself, but what it needs
                return f"{module} needs the module {error.name}, which is not installed{place(error)}"
        except SyntaxError as error:
            where = f", in {error.filename}:{error.lineno}" if error.filename else place_of_module(module)
            return f"{module} cannot be imported: {error.msg}{where}"
        except Exception as error:  # whatever code of a user's raises
            said = " ".join(str(error).split())
            return f"{module} cannot be imported: {type(error).__name__}: {said:.200}{place(error)}"
    return None


def place_of_module(module: str) -> str:
    """The file of a module that does not parse, where its error names none."""
    spec = find_spec(module)
    return f", in {spec.origin}" if spec is not None and spec.origin else ""


def path_of_file(value: str) -> str | None:
    """The import path that was written as a file is, my_rewards.py:brief or ./my_rewards.brief; None of any other.

    Args:
        value: as given; where it names a file alone, the first function or class in it is taken.
    """
    file, _, name = value.strip().removeprefix("./").partition(":")
    module = file.removesuffix(".py").replace("/", ".")
    if module == value or not all(part.isidentifier() for part in (*module.split("."), *name.split(".")[: bool(name)])):
        return None
    if name or not file.endswith(".py"):
        return f"{module}.{name}" if name else module
    return f"{module}.{(names_in(module) or ['score'])[0]}"


def names_in(module: str) -> list[str] | None:
    """The functions and classes of a module of the user's, by its name; None if there is no such file.

    What fails in it is told once one of them is named.
    """
    spec = find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.has_location:
        return None
    try:
        made = vars(import_module(module)).items()
    except Exception:  # whatever code of a user's raises
        return []
    return [name for name, part in made if getattr(part, "__module__", None) == module and name[0] != "_"]


def left_while_imported(left: SystemExit) -> UserError | None:
    """What to say of a module that ends the program as it is imported, as a script does; None if none did."""
    frames = [frame for frame in traceback.extract_tb(left.__traceback__) if frame.name == "<module>"]
    if not frames:
        return None
    return UserError(
        f"{frames[-1].filename}:{frames[-1].lineno} ends the program while it is imported ({left.code}); put what is "
        "for the command line alone below `if __name__ == '__main__':`"
    )


def failed_constructor(kind: Any, error: Exception) -> str | None:
    """Which class of a user's could not be made, why and where; None where the words of an error say all of it.

    Args:
        kind: the class that a config names.
        error: of its constructor.
    """
    home = sys.modules.get(getattr(kind, "__module__", ""))
    file, package = getattr(home, "__file__", None), getattr(home, "__name__", "").partition(".")[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    of_libraries = package in BETWEEN | OURS or modules(error)[-1][0].partition(".")[0] in OURS
    if not frames or of_libraries or (isinstance(error, ValueError) and on_purpose(error)):
        return None
    return (
        f"{kind.__module__}.{kind.__qualname__} cannot be made: {type(error).__name__}: {one_line(error, 200)}, in "
        f"{frames[-1].filename}:{frames[-1].lineno}"
    )


def refused_value(kind: Any, error: Exception, named: bool) -> str | None:
    """What a constructor says of its arguments, to stand behind the option that names the class.

    Args:
        kind: the class.
        error: of its constructor.
        named: whether there is such an option.

    Returns:
        None where that is for others to tell.
    """
    if not named or not isinstance(error, UserError | MisconfigurationException | ValueError) or not on_purpose(error):
        return None
    whose = "" if isinstance(error, UserError) else f"{kind.__module__}.{kind.__qualname__}: "
    return f"{whose}{one_line(error, LONGEST)}"


def place(error: BaseException) -> str:
    """Where in the module that was imported an error came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
