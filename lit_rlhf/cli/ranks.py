"""What ends one rank of a run ends them all, is told once, and gives the run its status."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import Trainer

from lit_rlhf.signals import Stop

SECONDS_BEHIND = 2.0  # that a rank gives the first one to tell what ends both
SECONDS_TO_END = 15.0  # that a rank waits for its end, once it is without a connection to another
SECONDS_TO_MEET = 60.0  # after which a rank says that it waits for the others
STARTED_BY = "LIT_RLHF_STARTED_BY"  # variable with the process that starts the ranks, for those that it starts
NEVER_MET = re.compile(r"waiting for clients|while trying to connect")
LOST = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused|aborted)|broken pipe|by peer|" + NEVER_MET.pattern,
    re.IGNORECASE,
)


class Ranks(threading.Thread):
    """The ranks of a run, as one of them knows them; watches those that Lightning starts from this process.

    Lightning's own observer kills this process where another has failed, whose status is then lost, or has just ended.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(daemon=True, name="ranks")
        self.alone = trainer.world_size == 1
        self.launcher: Any = trainer.strategy.launcher
        self.timeout = getattr(trainer.strategy, "_timeout", None)
        self.children: list[subprocess.Popen] = []
        self.over = threading.Event()
        self.parent = 0  # that started this rank
        if "LOCAL_RANK" in os.environ:
            self.parent = int(os.environ.get(STARTED_BY, 0))
        else:
            os.environ[STARTED_BY] = str(os.getpid())
        if hasattr(self.launcher, "procs"):
            self.start()

    def run(self) -> None:
        """End this process too, some time after a child has failed: it may be waiting for it where no signal comes.

        At once, if the rank is gone that started this one. If the ranks do not meet, say so.
        """
        until = time.monotonic() + SECONDS_TO_MEET
        while not self.failed:
            if self.parent and os.getppid() != self.parent:
                print(f"error: rank {rank()} has lost rank 0, which was killed; is the memory full?", file=sys.stderr)
                os._exit(1)
            if not self.alone and time.monotonic() > until and not torch.distributed.is_initialized():
                most = f"; it does for {self.timeout} at most (timeout of trainer.strategy)" if self.timeout else ""
                print(f"rank {rank()} waits for the other ranks to be there{most}", file=sys.stderr)
                until = float("inf")
            if self.launcher.procs:  # the observer's own list
                self.children, self.launcher.procs[:] = self.launcher.procs[:], []
            if self.over.wait(0.2):
                return
        if not self.over.wait(SECONDS_TO_END):
            self.tell_of_child()
            self.end()
            os._exit(self.failed)

    @property
    def failed(self) -> int:
        """The status of the first child that has failed, as a shell has it; 0 if none has."""
        return next((status if status > 0 else 128 - status for status in self.statuses if status), 0)

    @property
    def statuses(self) -> list[int]:
        """Of the children; 0 also of those that are still there."""
        return [process.poll() or 0 for process in self.children]

    def tell_of_child(self) -> None:
        """Say it for a child that a signal has left no time to."""
        for number, status in enumerate(self.statuses, 1):
            if status < 0 and status not in (-signal.SIGTERM, -signal.SIGINT):
                name = signal.Signals(-status).name
                print(f"error: rank {number} was ended by {name}; is the memory full?", file=sys.stderr)

    def end(self) -> None:
        """Leave no child behind."""
        self.over.set()
        for process in self.children:
            process.send_signal(signal.SIGTERM)  # to one that has ended, nothing
        for process in self.children:
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()

    def lost(self, error: BaseException | None) -> bool:
        """Whether an error only says that another rank is gone."""
        while error is not None and not self.alone:
            if isinstance(error, RuntimeError) and LOST.search(str(error)):
                return True
            error = error.__cause__ or error.__context__
        return False

    def follow(self, error: BaseException) -> int:
        """Wait to be ended like the rank that is gone, and let it have the word; returns the status to end with."""
        since = time.monotonic()
        try:
            while time.monotonic() - since < SECONDS_TO_END:
                if self.failed:
                    self.tell_of_child()
                    return self.failed
                time.sleep(0.1)
        except Stop as stop:  # torchrun ends the others
            return stop.status
        if NEVER_MET.search(str(error)):
            address = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            tell(
                f"error: rank {rank()} has not met the other ranks at {address} within {self.timeout} (timeout of "
                "trainer.strategy); has one of them ended, or been given another address?"
            )
            return 1
        tell(f"error: rank {rank()} is without a connection to another rank, which has ended: {first_line(error)}")
        return 1


def tell(line: str) -> None:
    """Say what ended this rank, unless the first one, which ends for the same reason, has said it meanwhile."""
    if rank():
        try:
            time.sleep(SECONDS_BEHIND)
        except Stop:
            return
    print(line, file=sys.stderr)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:  # what torchrun ends its own report with
        content = {"message": line, "extraInfo": {"py_callstack": line, "timestamp": str(int(time.time()))}}
        Path(file).write_text(json.dumps({"message": content}), encoding="utf-8")


def rank() -> int:
    """Of this process, as far as is known."""
    return getattr(rank_zero_only, "rank", None) or 0


def first_line(error: BaseException) -> str:
    """Of what it says."""
    return (str(error).splitlines() or [type(error).__name__])[0]
