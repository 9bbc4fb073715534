"""What is logged while a bar is drawn stands above of it."""

import errno
import io
import logging
import sys
import threading
import warnings

import pytest
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lit_rlhf.cli.terminal import is_news, leave_to_the_run, log_above_bars, quiet_libraries


def test_loggers_that_hold_the_terminal_write_to_what_stands_for_it_while_a_bar_is_drawn(monkeypatch):
    terminal, above, file = io.StringIO(), io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("tests.terminal")
    handlers = [logging.StreamHandler(), logging.StreamHandler(file)]
    monkeypatch.setattr(logger, "handlers", handlers)
    log_above_bars()
    monkeypatch.setattr(sys, "stderr", above)  # as rich does
    logger.warning("said")
    assert (terminal.getvalue(), above.getvalue(), file.getvalue()) == ("", "said\n", "said\n")


def test_defaults_of_classes_that_yaml_cannot_hold_are_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet_libraries()
        warnings.warn(
            "\n    Unable to serialize instance cpu\n", stacklevel=1
        )  # as of StochasticWeightAveraging's device
        with pytest.raises(UserWarning, match="other"):
            warnings.warn("other", stacklevel=1)


def test_a_disk_that_fills_up_under_the_curves_is_told_by_the_main_thread_alone(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(threading, "excepthook", lambda failed: told.append(failed.exc_type))
    leave_to_the_run()
    writer = EventFileWriter(str(tmp_path / "logs"))
    monkeypatch.setattr(writer._general_file_writer, "write", full)
    writer.add_event(event_pb2.Event(step=1))
    with pytest.raises(OSError, match="No space left"):
        writer.flush()
    thread = threading.Thread(target=full, args=("of another",))
    thread.start()
    thread.join()
    assert told == [OSError]


def test_a_worker_whose_death_comes_up_where_nothing_can_be_raised_is_told_by_the_run_alone(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: told.append(str(lost.exc_value)))
    leave_to_the_run()

    class Dies:
        def __init__(self, error):
            self.error = error

        def __del__(self):
            raise self.error

    for said in ("DataLoader worker (pid 7) is killed by signal: Killed. ", "another"):
        Dies(RuntimeError(said))
    assert told == ["another"]


def test_a_connection_to_a_worker_that_died_is_no_news_of_its_own(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(str(error)))
    leave_to_the_run()
    for module in ("multiprocessing.resource_sharer", "another"):
        for error in ("ConnectionResetError", "EOFError", "KeyError"):
            try:
                exec(f"raise {error}('{module} {error}')", {"__name__": module})
            except Exception as raised:
                sys.excepthook(type(raised), raised, raised.__traceback__.tb_next)
    assert told == [
        "'multiprocessing.resource_sharer KeyError'",
        "another ConnectionResetError",
        "another EOFError",
        "'another KeyError'",
    ]


def full(data):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_tells_nobody_anything_is_left_out():
    def record(text):
        return logging.LogRecord("lightning", logging.INFO, "", 0, text, (), None)

    assert is_news(record("GPU available: False, used: False")) and is_news(record("TPU available: True, using: 8"))
    assert not is_news(record("TPU available: False, using: 0 TPU cores"))
    assert not is_news(record("Loading `train_dataloader` to estimate number of stepping batches."))
