import resource
from threading import Thread

import pytest

from lit_rlhf import memory_limit as limits
from lit_rlhf.memory_limit import memory_limit


def test_what_asks_for_more_than_the_limit_is_refused_and_what_asks_for_less_is_not():
    with pytest.raises(MemoryError), memory_limit(2**26):
        bytearray(2**27)
    with memory_limit(2**28):
        bytearray(2**27)


def test_the_limit_is_there_inside_alone_whatever_happens_there():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ZeroDivisionError), memory_limit(2**26):
        assert resource.getrlimit(resource.RLIMIT_AS)[0] > 2**26
        raise ZeroDivisionError
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_lower_limit_that_is_set_already_stays():
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    low = limits._held() + 2**27
    resource.setrlimit(resource.RLIMIT_AS, (low, most))
    try:
        with memory_limit(2**40):
            assert resource.getrlimit(resource.RLIMIT_AS)[0] == low
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def test_another_thread_sets_none_and_so_does_a_system_that_does_not_say_what_is_held(monkeypatch):
    seen = []

    def look():
        with memory_limit(2**26):
            seen.append(resource.getrlimit(resource.RLIMIT_AS))

    thread = Thread(target=look)
    thread.start()
    thread.join()
    monkeypatch.setattr(limits, "PAGES", "/nowhere/statm")
    look()
    assert seen == [resource.getrlimit(resource.RLIMIT_AS)] * 2
