"""Files that are whole or not there."""

import json
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UserError


@contextmanager
def replacing(target: Path, shared: bool = False) -> Iterator[Path]:
    """Where to write a file that takes the place of `target` once it is whole; an error leaves what was there.

    Args:
        target: the file; its folder is made.
        shared: several processes may write it at the same time. Else what a killed one left is written over.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}{f'.{uuid.uuid4().hex}' if shared else ''}.new")
    try:
        yield aside
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def make_folder(folder: Path, option: str) -> None:
    """Make the folder that an option names: before an hour's work that ends in it, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {folder.absolute()} cannot be made ({error})") from error


def write_json(content: Any, file: Path) -> None:
    """One value as JSON."""
    write_lines([json.dumps(content, indent=2)], file)


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Lines in UTF-8."""
    with replacing(file) as aside, aside.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
