"""The error that a user can mend (the CLI prints its message alone, without a traceback), and what it is raised for."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Bad input or configuration; says what came, what was expected and what to do."""


def looks_like_a_path(name: str) -> bool:
    """Whether a name that is no file or folder was meant as one, rather than as `owner/name` on a hub."""
    in_a_folder = "/" in name and Path(name).expanduser().parent.is_dir()
    return in_a_folder or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Refuse an option whose value does not hold to what is expected of it."""
    if not holds:
        raise UserError(f"{name} ({value}) must be {expected}")


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
