import multiprocessing
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from lit_rlhf.data.processes import ProcessDied, in_processes


def sends_twice(i, send):
    send("a")
    send("b")


def test_what_each_process_sends_comes_with_its_number_and_in_its_order():
    got = list(in_processes(sends_twice, 3))
    assert sorted(got) == [(i, letter) for i in range(3) for letter in "ab"]
    assert not multiprocessing.active_children()


def killed_before_the_second(i, send):
    send("begun")
    if i == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def killed_in_a_message(i, send):
    if i == 0:
        pipe = send.__closure__[0].cell_contents
        os.write(pipe.fileno(), b"\0\0\1\0half of what was announced")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


@pytest.mark.parametrize(("work", "number"), [(killed_before_the_second, 1), (killed_in_a_message, 0)])
def test_a_process_that_is_killed_ends_all_at_once(work, number):
    since = time.monotonic()
    with pytest.raises(ProcessDied) as death:
        list(in_processes(work, 3))
    assert death.value.number == number and death.value.how == "was ended by SIGKILL"
    assert time.monotonic() - since < 30 and not multiprocessing.active_children()


def fails(i, send):
    if i == 1:
        raise KeyError("no")
    time.sleep(60)


def test_what_one_raises_ends_all_and_says_where():
    with pytest.raises(KeyError) as error:
        list(in_processes(fails, 2))
    assert "In process 1" in error.value.__notes__[0] and "in fails" in error.value.__notes__[0]
    assert not multiprocessing.active_children()


ORPHANS = """
import os, signal, sys, time
from lit_rlhf.data.processes import in_processes
def work(i, send):
    send(os.getpid())
    time.sleep(60)
for _, process in in_processes(work, 2):
    print(process, flush=True)
"""


def test_processes_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", ORPHANS], stdout=subprocess.PIPE, text=True)
    children = [int(parent.stdout.readline()) for _ in range(2)]
    assert all(map(psutil.pid_exists, children))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 30
    while any(psutil.pid_exists(child) and psutil.Process(child).status() != "zombie" for child in children):
        assert time.monotonic() < until
        time.sleep(0.05)
