"""Which tests play the environment, before those that this run leaves out are dropped."""

import pytest
from compatibility import MARKED


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    marks = [(item.path, item.get_closest_marker("plays")) for item in items]
    config.stash[MARKED] = [(path, mark.args) for path, mark in marks if mark is not None]
