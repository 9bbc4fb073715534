"""One run of the command line in a process of its own, forked so that nothing is imported again."""

import atexit
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from lit_rlhf.cli.main import main

SECONDS = 240.0  # after which a run hangs that takes about one, or half a minute to say that a rank is not there


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own: libraries start threads, after which forking is not safe."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(read)
        try:
            answer = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        with os.fdopen(write, "wb") as stream:
            pickle.dump(answer, stream)
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as stream:
        done, value = pickle.load(stream)
    os.waitpid(process, 0)
    assert done, value
    return value


class Ended(NamedTuple):
    """How a process ended."""

    status: int  # as `Popen` has it: below 0 = by that signal
    hung: bool
    told: str  # what it wrote to its standard error
    seconds: float


class Run:
    """The command line in a forked process.

    Args:
        folder: of the run, where it starts and what it writes is; caches included.
        arguments: of the command line.
        before: called in the process before the command line is.
        environment: variables for it.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        before: Callable[[], None] = lambda: None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder, self.since = folder, time.monotonic()
        self.log = folder.with_name(f"{folder.name}.{time.monotonic_ns()}.log")
        sys.stdout.flush()
        sys.stderr.flush()
        self.process = os.fork()
        if self.process == 0:
            os._exit(self.child(arguments, before, environment or {}))

    def child(self, arguments: Sequence[str], before: Callable[[], None], environment: dict[str, str]) -> int:
        """What the forked process does; returns its status."""
        status = 1
        try:
            os.setpgid(0, 0)
            os.chdir(self.folder)
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ |= {"LIT_RLHF_CACHE": str(self.folder / "cache")} | environment
            datasets.config.HF_DATASETS_CACHE = self.folder / "cache" / "tokens"
            before()
            sys.argv = ["lit-rlhf", *(str(argument) for argument in arguments)]
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        threading._shutdown()  # type: ignore[attr-defined]  # as at the end of any program
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        return status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal; to one that has ended, nothing."""
        os.kill(self.process, number)

    def kill_after(self, seconds: float, number: int = signal.SIGKILL) -> None:
        """Send it a signal some time after its start."""
        time.sleep(max(0.0, self.since + seconds - time.monotonic()))
        self.kill(number)

    def wait(self, seconds: float = SECONDS) -> Ended:
        """How it ended, which is by force after some time."""
        while not (waited := os.waitpid(self.process, os.WNOHANG))[0] and time.monotonic() - self.since < seconds:
            time.sleep(0.005)
        hung = not waited[0]
        if hung:
            self.kill()
            waited = os.waitpid(self.process, 0)
        with suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)  # its workers, if it left some
        told = self.log.read_text(errors="replace") if self.log.exists() else ""
        self.log.unlink(missing_ok=True)
        return Ended(os.waitstatus_to_exitcode(waited[1]), hung, told, time.monotonic() - self.since)
