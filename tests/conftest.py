"""What must be set before any library is imported, and what no test may touch."""

import os
import signal

import jaxtyping
import pytest

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # Tianshou: compiling takes longer than its tests
# What a shell's `make test &` and `nohup make test` hand on to all that runs there.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache of reference log-probs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def handler_of_torch():
    """The one that torch sets with the first worker of a process is there before any test, whichever needs it first."""
    from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

    _set_SIGCHLD_handler()


@pytest.fixture(autouse=True)
def own_signals():
    """A test leaves the handlers of signals as it found them; what is forked later would inherit them."""
    others = signal.valid_signals() - {signal.SIGALRM}  # which is pytest-timeout's
    before = {number: signal.getsignal(number) for number in others}
    yield
    changed = {number: found for number in before if (found := signal.getsignal(number)) != before[number]}
    for number in changed:
        signal.signal(number, before[number])
    assert not changed


@pytest.fixture
def wrong_types(monkeypatch):
    """For tests of wrong types: the answer that a user gets, who has no beartype, rather than its own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A tiny model and files of each format, for the tests of one module."""
    from tests.stages import write_inputs

    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model's folder, for the tests of one module."""
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
