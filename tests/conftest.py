import pytest


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache of reference log-probs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIT_RLHF_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
