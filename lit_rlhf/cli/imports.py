"""Modules of the user's that fail while they are imported, which jsonargparse does not tell from other values."""

import re
import sys
import traceback
from importlib import import_module
from importlib.util import find_spec

from lit_rlhf.errors import UserError

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
            return f"{module} cannot be imported: {error.msg}, in {error.filename}:{error.lineno}"
        except Exception as error:  # whatever code of a user's raises
            said = " ".join(str(error).split())
            return f"{module} cannot be imported: {type(error).__name__}: {said:.200}{place(error)}"
    return None


def left_while_imported(left: SystemExit) -> UserError | None:
    """What to say of a module that ends the program as it is imported, as a script does; None if none did."""
    frames = [frame for frame in traceback.extract_tb(left.__traceback__) if frame.name == "<module>"]
    if not frames:
        return None
    return UserError(
        f"{frames[-1].filename}:{frames[-1].lineno} ends the program while it is imported ({left.code}); put what is "
        "for the command line alone below `if __name__ == '__main__':`"
    )


def place(error: BaseException) -> str:
    """Where in the module that was imported an error came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name == "<module>"]
    return f", in {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
