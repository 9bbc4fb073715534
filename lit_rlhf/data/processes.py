"""Work in several processes, each of which may be killed.

They share no queue and no lock, as those of a pool do: one that is killed, as where memory is full, takes nothing with
it that this process or the others wait for.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from lit_rlhf.errors import UserError

Send = Callable[[Any], None]


class ProcessDied(Exception):
    """A process ended before its work did.

    Attributes:
        number: of the process.
        how: it ended.
    """

    def __init__(self, number: int, exitcode: int) -> None:
        self.number = number
        self.how = f"was ended by {signal.Signals(-exitcode).name}" if exitcode < 0 else f"ended with status {exitcode}"
        super().__init__(f"process {number} {self.how}")


def in_processes(work: Callable[[int, Send], None], number: int) -> Iterator[tuple[int, Any]]:
    """Call `work(i, send)` for each i below `number`, in a process each; none is left once this ends.

    Args:
        work: what it sends is yielded here, with its i.
        number: of processes.

    Raises:
        ProcessDied: as the first of them did.
        Exception: what `work` raised first.
    """
    working: dict[Connection, tuple[int, Any]] = {}
    try:
        for i in range(number):
            reader, writer = multiprocessing.Pipe(duplex=False)
            process = multiprocessing.Process(target=_work, args=(work, i, writer), daemon=True)
            process.start()
            writer.close()  # now that process alone holds it, so that its end is the pipe's
            working[reader] = (i, process)
        while working:
            for reader in cast(list[Connection], wait(list(working))):
                i, process = working[reader]
                try:
                    kind, content = reader.recv()
                except (EOFError, OSError):
                    process.join()
                    raise ProcessDied(i, process.exitcode) from None
                if kind == "sent":
                    yield i, content
                elif kind == "raised":
                    raise content
                else:
                    _end(process)
                    del working[reader]
    finally:
        for _, process in working.values():
            _end(process)


def _end(process: Any) -> None:
    process.kill()
    process.join()
    process.close()


def _work(work: Callable[[int, Send], None], i: int, pipe: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(i, lambda content: pipe.send(("sent", content)))
    except Exception as error:
        if not isinstance(error, UserError):
            error.add_note(f"In process {i}: {traceback.format_exc()}")
        pipe.send(("raised", error))
    else:
        pipe.send(("done", None))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()  # until it is gone
    os._exit(1)
