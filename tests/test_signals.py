"""What a signal does to the process that listens; callbacks/test_stopping.py has what it does to a run."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from lit_rlhf import signals
from lit_rlhf.signals import SECONDS_APART, Listener, Stop


@pytest.fixture
def listener():
    """Listens to the signals of this process while a test runs."""
    with (listener := Listener()).listening():
        yield listener


@pytest.fixture
def died_of(monkeypatch):
    """The signals that would have ended the process."""
    numbers = []
    monkeypatch.setattr(signals, "die_of", numbers.append)
    return numbers


def alone():
    return SimpleNamespace(world_size=1)


def beside_a_rank_that_got(number):
    """A Trainer of two ranks, of which the other one has got a signal."""

    def reduce(asked, reduce_op):
        assert reduce_op == "max"
        return max(asked, asked.new_tensor(float(number)))

    return SimpleNamespace(world_size=2, strategy=SimpleNamespace(root_device="cpu", reduce=reduce))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)]
)
def test_a_signal_stops_the_program_where_it_meets_it_with_the_status_that_a_shell_would_give(listener, number, status):
    with pytest.raises(Stop, match=number.name) as stop:
        os.kill(os.getpid(), number)
    assert stop.value.status == status
    assert not isinstance(stop.value, Exception)  # `except Exception` of a user's function does not catch it


def test_a_signal_that_is_deferred_waits_for_a_moment_at_which_nothing_is_half_done(listener):
    listener.deferring = True
    os.kill(os.getpid(), signal.SIGTERM)
    assert listener.received == signal.SIGTERM
    with pytest.raises(Stop, match="SIGTERM"):
        listener.obey(alone())


def test_a_run_of_one_process_may_be_stopped_anywhere_within_what_is_interruptible_and_not_after(listener):
    listener.deferring = True
    with listener.interruptible(alone()):
        pass
    assert listener.deferring
    with pytest.raises(Stop), listener.interruptible(alone()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert listener.deferring


def test_all_ranks_stop_by_the_signal_that_any_of_them_has_got_before_what_is_interruptible_begins(listener):
    listener.deferring = True
    began = []
    with pytest.raises(Stop, match="SIGTERM"), listener.interruptible(beside_a_rank_that_got(signal.SIGTERM)):
        began.append(True)
    assert not began
    listener.obey(beside_a_rank_that_got(0))


def test_the_same_ctrl_c_that_comes_twice_is_one_and_a_second_one_ends_the_process(listener, died_of, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    listener.deferring = True
    for wait in (0.0, SECONDS_APART / 2):
        now[0] += wait
        os.kill(os.getpid(), signal.SIGINT)
        assert died_of == []  # as the terminal and torchrun both hand it on
    now[0] += SECONDS_APART
    os.kill(os.getpid(), signal.SIGTERM)
    assert died_of == []  # asks again for what is under way
    os.kill(os.getpid(), signal.SIGINT)
    assert died_of == [signal.SIGINT]


def test_a_process_that_was_forked_listens_no_longer_but_dies_of_sigterm_and_leaves_ctrl_c_to_its_parent(listener):
    listener.deferring = True
    child = os.fork()
    if not child:
        handlers = [signal.getsignal(number) for number in signals.ENDING]
        os._exit(
            handlers == [*signals.IN_FORKS.values()] == [signal.SIG_DFL, signal.SIG_IGN, signal.SIG_IGN, 0]
            and not listener.deferring
            and listener.process is None
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert all(signal.getsignal(number) is listener for number in signals.ENDING)


def test_a_signal_that_comes_while_a_process_is_forked_is_kept_for_afterwards(listener):
    signals.fork.before()
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # and not another thread, which listens on
    try:
        assert listener.received == 0
    finally:
        with pytest.raises(Stop, match="SIGTERM"):
            signals.fork.after()  # which the system calls, deaf to errors
            time.sleep(10)


def test_a_child_that_is_sent_home_while_it_is_forked_dies(listener):
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, listener)  # as if it were not ready yet
        signals.fork.before()
        os.kill(os.getpid(), signal.SIGTERM)
        signals.fork.child()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize(
    ("number", "dies"),
    [(signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGHUP, False), (signal.SIGXCPU, True)],
)
def test_a_process_that_was_just_forked_obeys_its_parent_too(listener, died_of, number, dies):
    listener.process = os.getpid() + 1  # the one that listened
    os.kill(os.getpid(), number)
    assert (died_of == [number]) == dies and listener.received == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_that_is_ignored_stays_ignored_as_of_a_script_in_the_background_or_by_nohup(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Listener().listening():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_a_run_prints_on_to_nowhere_once_its_terminal_is_gone(listener, monkeypatch):
    master, terminal = os.openpty()
    with open(terminal, "wb", buffering=0) as output:
        monkeypatch.setattr(sys, "stderr", output)
        os.close(master)
        with pytest.raises(OSError, match="Input/output error"):
            output.write(b"a line")
        with pytest.raises(Stop, match="SIGHUP"):
            os.kill(os.getpid(), signal.SIGHUP)
        assert output.write(b"a line") == 6


def test_the_handlers_are_those_of_before_once_it_listens_no_more():
    before = [signal.getsignal(number) for number in signals.ENDING]
    with pytest.raises(KeyError), (listener := Listener()).listening():
        assert all(signal.getsignal(number) is listener for number in signals.ENDING)
        raise KeyError
    assert [signal.getsignal(number) for number in signals.ENDING] == before


def test_a_signal_of_lightnings_waits_for_such_a_moment_too_and_ends_nothing(listener):
    told = []
    listener.deferred[signal.SIGUSR1] = lambda number, frame: told.append(number)
    before = signal.signal(signal.SIGUSR1, listener)
    try:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told == []
        for _ in range(2):
            listener.obey(alone())
        assert told == [signal.SIGUSR1]  # once
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_that_came_while_a_program_listened_is_nothing_to_the_next(listener):
    listener.deferring = True
    os.kill(os.getpid(), signal.SIGTERM)
    with listener.listening():
        listener.obey(alone())
    listener.obey(alone())


PROGRAM = """
    import os, signal, time
    from lit_rlhf.signals import SIGNALS

    with SIGNALS.listening():
        SIGNALS.deferring = True
        for _ in range(5):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        print("five at once are one", flush=True)
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGINT)
        print("not reached")
"""


def test_a_first_ctrl_c_is_answered_at_once_and_a_second_one_ends_the_program():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(PROGRAM)], capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGINT
    assert done.stdout == "five at once are one\n"
    assert done.stderr == "stopping after this step; Ctrl-C again ends the run at once, without a checkpoint\n"
