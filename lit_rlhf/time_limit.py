"""A limit on the time that code of others may take: a function of the user's, a chat template."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lit_rlhf.errors import UserError


class TimeIsUp(BaseException):
    """Raised inside of the function; no `Exception`, which the function might catch as one of its own."""


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Stop what runs inside after some seconds; None = let it run.

    By the system's alarm, which interrupts Python code, waiting for the network and a regular expression that never
    ends. Another alarm that is set goes off as it would have; code that sets one of its own takes this one's place.

    Raises:
        TimeoutError: the time is up; its traceback leads to where the function was.
        UserError: this is not the main thread, which alone is interrupted.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"timeout ({seconds}) works in the main thread alone; set it to null, or run the trainer there")
    began, running = time.monotonic(), False

    def ring(number: int, frame: FrameType | None) -> None:
        if running:
            raise TimeIsUp

    handler = signal.signal(signal.SIGALRM, ring)
    # Again and again, if the code catches it; longer than a system's clock counts is as long as it takes.
    left, interval = signal.setitimer(signal.ITIMER_REAL, min(seconds, threading.TIMEOUT_MAX), 1.0)
    try:
        try:
            running = True  # from here on what rings is caught below
            yield
        finally:
            running = False
    except TimeIsUp as up:
        error = TimeoutError(f"it took longer than timeout, {seconds:g} s")
        raise error.with_traceback(up.__traceback__) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), interval)
    if time.monotonic() - began > seconds:
        raise TimeoutError(f"it took longer than timeout, {seconds:g} s")
