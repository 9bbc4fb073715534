"""Moments of a run at which it dies or stumbles, chosen before it starts and met from within its process."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lit_rlhf import files
from token_mdp.vector_env import TokenVectorEnv

# What is being changed, by a part of its path; the first that fits.
KINDS = {
    "checkpoint": ".ckpt",
    "export": "run/model",
    "export aside": "run/.model",
    "reference cache": "cache/reference",
    "token cache": "cache/tokens",
    "completions": "predictions.jsonl",
    "logs and summary": "run/",
}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def kind_of(path: str) -> str:
    """What a file belongs to."""
    return next((kind for kind, part in KINDS.items() if part in path), "folders")


def changed(event: str, given: tuple[Any, ...]) -> Any:
    """The path that an event of Python's is about to change; None if it changes none."""
    if event == "open":
        path, mode, flags = given
        return path if set(mode or "") & set("wax+") or (flags or 0) & WRITES else None
    if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"):
        return given[0]
    return None


def watch(folder: Path, act: Callable[[str], None]) -> None:
    """Call `act` with the path before each step by which this process changes a file in a folder.

    Written into a file is not: `cut_short` ends a process there.
    """

    def seen(path: Any) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            whole = os.path.abspath(os.fsdecode(path))
            if whole.startswith(f"{folder}/"):
                act(whole)

    sys.addaudithook(lambda event, given: seen(changed(event, given)))
    sync, exchange = os.fsync, files.exchange

    def watched_sync(handle: int) -> None:
        seen(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def watched_exchange(one: Path, other: Path) -> bool:
        seen(other)
        return exchange(one, other)

    os.fsync, files.exchange = watched_sync, watched_exchange  # type: ignore[assignment]


def die() -> None:
    """As the kernel kills who takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_change(folder: Path, kind: str, number: int) -> None:
    """End this process before its `number`-th change, counted from 0, of files of one kind."""
    left = [number]

    def act(path: str) -> None:
        if kind_of(path) == kind:
            left[0] -= 1
            if left[0] < 0:
                die()

    watch(folder, act)


def cut_short(size: int) -> None:
    """End this process where it would make a file longer than `size` bytes: up to there, it is written."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)


def die_in_rollout(number: int) -> None:
    """End this process at its `number`-th step of the environment, counted from 0."""
    step, left = TokenVectorEnv.step, [number]

    def counted(self: TokenVectorEnv, actions: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            die()
        return step(self, actions)

    TokenVectorEnv.step = counted  # type: ignore[method-assign]


def note_changes(folder: Path, notes: Path) -> None:
    """Write down what kinds of files are changed, step by step."""
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    watch(folder, lambda path: os.write(handle, f"{kind_of(path)}\n".encode()) and None)


def rename_in_two_steps() -> None:
    """As on a file system that does not exchange names in one."""
    files.exchange = lambda one, other: False
