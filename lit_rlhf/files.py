"""Files and folders that are whole or not there, whatever ends the process that writes them.

What is under way lies aside, as `.<name>.lit_rlhf-new` in the same folder, so that no part of it travels through the
system's temporary folder; it is on the disk before it gets its name. What a killed writer left there goes with the next
write into that folder.
"""

import ctypes
import fcntl
import itertools
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_rlhf.errors import UNREADABLE, UserError

NEW, OLD = ".lit_rlhf-new", ".lit_rlhf-old"
SECONDS_TO_DOUBT = 3600.0  # a write without progress for so long is dead, where the file system has no locks to tell by


@contextmanager
def replacing(target: Path, shared: bool = False) -> Iterator[Path]:
    """Where to write a file or a folder that takes the place of `target` once it is whole.

    Args:
        target: the file or folder; its parent is made.
        shared: several processes may write it at the same time.

    Raises:
        OSError: the disk is full or may not be written to; names the target, of which nothing new is there.
    """
    aside = aside_of(target, f".{uuid.uuid4().hex}{NEW}" if shared else NEW)
    try:
        with writing_into(target.parent):
            try:
                yield aside
                sync(aside)
                _move(aside, target)
                _sync_one(target.parent)
            finally:
                remove(aside)
    except OSError as error:
        if error.filename is None or NEW in os.fspath(error.filename):
            error.filename = os.fspath(target)
        raise


def aside_of(target: Path, suffix: str) -> Path:
    """Where `target` lies while it is written (NEW), or while it makes place for another (OLD)."""
    return target.with_name(f".{target.name}{suffix}")


def heal(target: Path) -> None:
    """Finish what a kill in the midst of `replacing` a folder left undone: the new one was whole by then."""
    if not target.name:
        return
    new, old = aside_of(target, NEW), aside_of(target, OLD)
    if old.exists() and not target.exists():
        with suppress(FileNotFoundError):  # another process was faster
            (new if new.exists() else old).rename(target)


def exchange(one: Path, other: Path) -> bool:
    """Let two folders change names in one step, so that whoever looks finds one of them; False where that is unknown.

    Linux does so on local file systems, https://man7.org/linux/man-pages/man2/rename.2.html (RENAME_EXCHANGE).
    """
    change = getattr(ctypes.CDLL(None), "renameat2", None)
    here, flag = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return change is not None and change(here, os.fsencode(one), here, os.fsencode(other), flag) == 0


def _move(aside: Path, target: Path) -> None:
    """Give a new file or folder its name in one step; a folder in two where it must, between which `heal` is needed."""
    if not (aside.is_dir() and target.is_dir()):
        aside.replace(target)
        return
    if exchange(aside, target):
        return
    old = aside_of(target, OLD)
    remove(old)
    target.rename(old)
    try:
        aside.rename(target)
    except OSError:
        old.rename(target)
        raise
    remove(old)


@contextmanager
def writing_into(folder: Path, *patterns: str) -> Iterator[None]:
    """Make a folder, clear it of what dead writers left in it, and keep others from taking this one for dead.

    Args:
        folder: where something is to be written.
        patterns: of the names that what is under way has besides ours, where another library writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clear(folder, *patterns)
    with _opened(folder) as handle:
        with suppress(OSError):  # network file systems know no locks on folders
            fcntl.flock(handle, fcntl.LOCK_SH)
        yield


def clear(folder: Path, *patterns: str) -> None:
    """Remove from a folder what dead writers left in it; another folder that lost its name to them gets it back.

    Args:
        folder: is there.
        patterns: as of `writing_into`.
    """
    with _opened(folder) as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            before = float("inf")
        except BlockingIOError:  # somebody is writing into it
            return
        except OSError:
            before = time.time() - SECONDS_TO_DOUBT
        for old in folder.glob(f".*{OLD}"):
            heal(old.with_name(old.name.removeprefix(".").removesuffix(OLD)))
        for path in itertools.chain.from_iterable(map(folder.glob, (f".*{NEW}", f".*{OLD}", *patterns))):
            with suppress(OSError):  # gone meanwhile, or somebody else's
                if max(file.stat().st_mtime for file in (path, *path.rglob("*"))) < before:
                    remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder that may be there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk hold a file, or a folder with all that is in it: a name that outlives a crash of the machine."""
    for inside in path.rglob("*") if path.is_dir() else ():
        _sync_one(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    with _opened(path) as handle:
        os.fsync(handle)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def said_of(option: str, folder: Path) -> Iterator[None]:
    """Tell what the system says of a folder, whatever that is, by the option that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{option}: {folder.absolute()} cannot be made ({error})") from error
    except UnicodeEncodeError as error:  # the name holds bytes that Python could not read in the system's encoding
        shown = str(folder.absolute()).encode("utf-8", "backslashreplace").decode()
        raise UserError(f"{option}: {shown} {UNREADABLE}, or name another folder") from error


def make_folder(folder: Path, option: str) -> None:
    """Make the folder that an option names: before an hour's work that ends in it, not after it."""
    with said_of(option, folder):
        str(folder).encode()  # TensorBoard and others hand names on in UTF-8
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{option}: {folder.absolute()} may not be written to")


def make_room(file: Path, option: str, ending: str, inputs: Iterable[Path] = ()) -> None:
    """Make the folder of a file that an option names, likewise.

    Args:
        file: to be written later on; an older one is replaced.
        option: that names it.
        ending: of what is written, such as .json.
        inputs: files that the run names, none of which it may replace.

    Raises:
        UserError: it is no file, of another ending, one of the inputs, or cannot be written there.
    """
    if file.is_dir() or (file.exists() and not file.is_file()):  # a device would be replaced by a file
        what = "a folder" if file.is_dir() else "a pipe or a device"
        raise UserError(f"{option}: {file.absolute()} is {what}; name a file")
    if file.suffix != ending:  # a reader would take it for what it is not; and others' files mostly end otherwise
        raise UserError(f"{option}: {file.absolute()} must end in {ending}, which is what is written")
    if file.exists() and any(one.exists() and file.samefile(one) for one in inputs):
        raise UserError(f"{option}: {file.absolute()} is what the run reads, and would be replaced; name another file")
    make_folder(file.parent, option)


def write_json(content: Any, file: Path) -> None:
    """One value as JSON."""
    write_lines([strict_json(content, indent=2)], file)


def strict_json(value: Any, **how: Any) -> str:
    """JSON that any reader takes, RFC 8259: NaN and infinities, which it has no words for, are null.

    Args:
        value: lists and objects of plain values.
        how: options of `json.dumps`.
    """
    return json.dumps(_without_nan(value), allow_nan=False, **how)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_lines(lines: Iterable[str], file: Path) -> None:
    """Lines in UTF-8."""
    with replacing(file) as aside, aside.open("w", encoding="utf-8") as stream:
        stream.writelines(f"{line}\n" for line in lines)
