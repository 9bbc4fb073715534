"""A limit on the memory that code of others may take: a chat template."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread

PAGES = "/proc/self/statm"  # of Linux: first, how many pages of addresses this process has


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Refuse to what runs inside memory beyond what the process has and some bytes.

    The limit is the process's, so that the main thread alone sets it: it would lift, or leave, that of another thread.
    Where the system does not say how much a process has (macOS), there is none.

    Args:
        more: bytes.

    Raises:
        MemoryError: what runs inside asked for more.
    """
    held = _held() if current_thread() is main_thread() else None
    if held is None:
        yield
        return
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + more if before < 0 else min(held + more, before), most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def _held() -> int | None:
    """Bytes of addresses that this process has; None where the system does not say."""
    try:
        handle = os.open(PAGES, os.O_RDONLY)  # a fifth of the time that a file object takes, for each conversation
    except FileNotFoundError:
        return None
    try:
        return int(os.read(handle, 64).split()[0]) * resource.getpagesize()
    finally:
        os.close(handle)
