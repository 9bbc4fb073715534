"""What must be set before any library is imported, and what no test may touch."""

import os

import pytest

os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # Tianshou: compiling takes longer than its tests


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache of reference log-probs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
