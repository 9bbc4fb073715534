import re
import signal
import threading
import time
import traceback

import pytest

from lit_rlhf.errors import UserError
from lit_rlhf.time_limit import time_limit


def loop():
    while True:
        pass


def stubborn():
    while True:
        try:
            time.sleep(30)
        except Exception:
            continue


def deaf():
    try:
        time.sleep(30)
    except BaseException:
        return


def patient():
    for _ in range(2):
        try:
            time.sleep(30)
        except BaseException:
            continue


ENDLESS = [loop, stubborn, lambda: time.sleep(30), lambda: re.match(r"(a+)+$", "a" * 40 + "b"), deaf, patient]


@pytest.mark.parametrize("function", ENDLESS, ids=["loop", "catches errors", "waits", "regex", "catches all", "again"])
def test_what_takes_too_long_is_stopped(function):
    since = time.monotonic()
    with pytest.raises(TimeoutError, match=r"it took longer than timeout, 0.2 s"), time_limit(0.2):
        function()
    assert time.monotonic() - since < 5


@pytest.mark.parametrize("seconds", [1e-9, 1e-6])
def test_a_limit_that_is_over_at_once_is_the_same_error_and_rings_no_more(seconds):
    before = signal.getsignal(signal.SIGALRM)
    for _ in range(20):
        with pytest.raises(TimeoutError, match="longer than timeout"), time_limit(seconds):
            time.sleep(1e-4)
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL)[1] == 0.0


def test_the_error_leads_to_where_the_function_was():
    with pytest.raises(TimeoutError) as error, time_limit(0.1):
        loop()
    assert "loop" in [frame.name for frame in traceback.extract_tb(error.value.__traceback__)]


@pytest.mark.parametrize("seconds", [None, 30.0, 1e30])
def test_what_is_done_in_time_is_left_alone(seconds):
    before = signal.getsignal(signal.SIGALRM)
    with time_limit(seconds):
        done = 1 + 1
    assert done == 2 and signal.getsignal(signal.SIGALRM) is before
    with pytest.raises(KeyError), time_limit(seconds):
        raise KeyError("own")


def test_another_alarm_goes_off_as_it_would_have():
    rung = []
    handler = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    timer, began = signal.setitimer(signal.ITIMER_REAL, 0.5), time.monotonic()
    try:
        with pytest.raises(TimeoutError), time_limit(0.1):
            loop()
        with time_limit(30):
            time.sleep(0.1)
        assert not rung
        while not rung and time.monotonic() - began < 5:
            time.sleep(0.01)
        assert 0.4 < rung[0] - began < 1.5
    finally:
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, *timer)


def test_in_another_thread_it_is_refused_rather_than_ignored():
    errors = []

    def run():
        try:
            with time_limit(1.0):
                pass
        except UserError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == ["timeout (1.0) works in the main thread alone; set it to null, or run the trainer there"]
