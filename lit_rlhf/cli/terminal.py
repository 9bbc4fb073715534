"""A terminal on which nothing is said that nobody needs, and nothing is drawn over that somebody does."""

import logging
import sys
import threading
import warnings
from types import TracebackType
from typing import Any

import datasets
from transformers.utils.logging import disable_progress_bar

from lit_rlhf.callbacks.progress import draws_bars
from lit_rlhf.cli.mistakes import DEAD_WORKER

NEWS_TO_NOBODY = ("Tip: For seamless", "TPU available: False", "Loading `train_dataloader`")


class CurrentStderr:
    """Whatever `sys.stderr` is at the time: while a bar is drawn, a stream that writes above of it."""

    def write(self, text: str) -> int:
        """Write there."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Have it seen."""
        sys.stderr.flush()


def quiet_libraries() -> None:
    """Keep advertisements, bars for the reading of a file, and warnings about Lightning's own code off the terminal."""
    disable_progress_bar()
    if not draws_bars():  # a log is lines
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message="The dirpath has changed")  # each part of a run has a folder of its own
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")  # `validation: null`
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")  # CompletionWriter goes without
    warnings.filterwarnings("ignore", message="The number of training batches")  # perf and rollout: each epoch
    warnings.filterwarnings("ignore", message=r"\s*Unable to serialize instance")  # a class's default: its text stands
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(is_news)


def is_news(record: logging.LogRecord) -> bool:
    """Whether what Lightning says tells a user something."""
    return not any(said in record.getMessage() for said in NEWS_TO_NOBODY)


def leave_to_the_run() -> None:
    """Leave errors that show up beside the run to it: it meets them again, and tells them.

    What a disk refuses TensorBoard's thread is handed to the main one. That a worker died is raised by torch as the
    signal comes, in whatever runs then: in a destructor or between the halves of a fork it is lost, and found again
    when the worker's next batch is awaited. A process that was about to hand tensors to one that died finds its
    connection gone, in a thread of multiprocessing's, which calls the hook of uncaught errors.
    """
    told, aside, uncaught = threading.excepthook, sys.unraisablehook, sys.excepthook

    def tell(failed: threading.ExceptHookArgs) -> None:
        ours = isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard.")
        if not ours:
            told(failed)

    def tell_aside(lost: Any) -> None:
        if not (isinstance(lost.exc_value, RuntimeError) and DEAD_WORKER.search(str(lost.exc_value))):
            aside(lost)

    def tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        raised_in = "" if trace is None else trace.tb_frame.f_globals.get("__name__")
        if not (raised_in == "multiprocessing.resource_sharer" and isinstance(error, ConnectionError | EOFError)):
            uncaught(kind, error, trace)

    threading.excepthook, sys.unraisablehook, sys.excepthook = tell, tell_aside, tell_uncaught


def log_above_bars() -> None:
    """Have the loggers that write to the terminal write above of a bar; they hold the stream from before it."""
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            if type(handler) is logging.StreamHandler and handler.stream in (sys.stderr, sys.__stderr__):
                handler.setStream(CurrentStderr())
