"""Signals that end a run, obeyed where nothing is half done.

SIGTERM (Slurm, Kubernetes, `timeout`), SIGINT (Ctrl-C), SIGHUP (terminal or SSH closed; `nohup` has it ignored) and
SIGXCPU (a limit of CPU time) raise `Stop` where they meet the program; while it defers them they are noted, until it
comes to a moment at which it can stop. `SIGNALS` serves the process, whose signals are one.
"""

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGXCPU)
# What they mean to a forked process (a worker): those that a terminal sends to all of a group are for its parent.
IN_FORKS: dict[int, Any] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.SIG_IGN,
    signal.SIGHUP: signal.SIG_IGN,
    signal.SIGXCPU: signal.SIG_DFL,
}
SECONDS_APART = 0.5  # of a second Ctrl-C from the first; nearer ones are one, which terminal and torchrun both hand on
STOPPING = "stopping after this step; Ctrl-C again ends the run at once, without a checkpoint"


class Stop(BaseException):
    """A signal ends the run here; no `Exception` and no `SystemExit`, which those catch who run code of users.

    Attributes:
        number: of the signal.
        status: of the process, as a shell has it: 128 and the signal's number.
        told: for the user, once somebody knows what the run leaves.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.status = 128 + number
        self.told: str | None = None


class Listener:
    """What signals the process has got, and whether they may end it at any moment."""

    def __init__(self) -> None:
        self.received = 0  # the signal that is to end the run; 0 = none
        self.since = 0.0  # it came
        self.deferring = False
        self.deferred: dict[int, Any] = {}  # other signals that wait for such a moment too -> their own handlers
        self.waiting: list[int] = []  # of these, those that have come
        self.process: int | None = None  # that listens; one that it forks does not

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        if os.getpid() != self.process:
            if IN_FORKS.get(number) == signal.SIG_DFL:  # before `Fork.child`
                die_of(number)
        elif number in self.deferred:
            self.waiting.append(number)
        elif not self.received:
            self.received, self.since = number, time.monotonic()
            if number == signal.SIGHUP:
                leave_terminal()
            if not self.deferring:
                raise Stop(number)
            if number == signal.SIGINT and not getattr(
                rank_zero_only, "rank", 0
            ):  # a step may take long; in a thread, since this one may be printing
                _thread.start_new_thread(print, (STOPPING,), {"file": sys.stderr})
        elif number == signal.SIGINT and time.monotonic() - self.since >= SECONDS_APART:
            die_of(number)

    def take_over(self) -> None:
        """Handle the signals that end a run, and those for which Lightning has a handler (Slurm's requeueing)."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if number in ENDING and handler != signal.SIG_IGN:  # as in the background of a script
                signal.signal(number, self)
            elif type(handler).__module__.startswith("lightning."):
                self.deferred[number] = handler
                signal.signal(number, self)

    @contextmanager
    def listening(self, at_once: bool = True) -> Iterator[None]:
        """Handle the signals that end a run from here on, or from the next `take_over`, and no longer afterwards."""
        before = {number: signal.getsignal(number) for number in ENDING}
        self.__dict__.update(vars(Listener()) | {"process": os.getpid()})
        if at_once:
            self.take_over()
        try:
            yield
        finally:
            self.__dict__.update(vars(Listener()))
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, handler)

    @contextmanager
    def interruptible(self, trainer: Any) -> Iterator[None]:
        """Within it nothing is half done, so that a signal may end a run of one process at any moment.

        Of several processes each would leave the others waiting; they end together, before it begins.
        """
        if trainer.world_size > 1:
            self.obey(trainer)
            yield
            return
        before, self.deferring = self.deferring, False
        try:
            self.obey(trainer)
            yield
        finally:
            self.deferring = before

    def obey(self, trainer: Any) -> None:
        """Do what signals ask that any rank has got; every rank must call it, where nothing is half done.

        Raises:
            Stop: the run is to end, on all ranks.
        """
        asked = max([self.received, *self.waiting])  # SIGTERM is above SIGUSR1 and 2, SIGINT is not: it can wait
        if trainer.world_size > 1:
            device = trainer.strategy.root_device
            asked = int(trainer.strategy.reduce(torch.tensor(float(asked), device=device), reduce_op="max"))
        if asked in self.deferred:
            self.waiting = []
            self.deferred[asked](asked, None)
        elif asked:
            raise Stop(asked)


def leave_terminal() -> None:
    """Write on to nowhere where the terminal is gone: a line that could not be printed would end the run at once."""
    for output in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # no file of the system's
            descriptor = output.fileno()
            try:
                os.write(descriptor, b"")
            except OSError:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


def die_of(number: int) -> None:
    """End the process by a signal, as if it had no handler."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


class Fork(threading.local):
    """Has processes that are forked (workers) die of SIGTERM, and leave Ctrl-C and SIGHUP to their parent.

    A handler would not do: Python forgets what meets the child before it is one, and a worker that is sent home as it
    begins to wait for a lock would wait for ever. So the system keeps signals back until the child is ready.
    """

    mask: set[Any] | None = None  # of this thread before it forked; None where nobody listens

    def before(self) -> None:
        """In the thread that forks; others may still meet a signal, which is the parent's then."""
        if any(isinstance(signal.getsignal(number), Listener) for number in ENDING):
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def after(self) -> None:
        """In parent and child."""
        mask, self.mask = self.mask, None
        if mask is None:
            return
        try:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        except Stop as stop:  # which nobody would hear of here
            listener: Any = signal.getsignal(stop.number)
            listener.received = 0
            threading.Timer(0.05, os.kill, (os.getpid(), stop.number)).start()

    def child(self) -> None:
        """In the child."""
        for number, handler in IN_FORKS.items():
            if isinstance(listener := signal.getsignal(number), Listener):
                signal.signal(number, handler)
                listener.__dict__.update(vars(Listener()))
        self.after()


fork = Fork()
os.register_at_fork(before=fork.before, after_in_parent=fork.after, after_in_child=fork.child)
SIGNALS = Listener()
