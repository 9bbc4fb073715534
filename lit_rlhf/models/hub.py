"""The Hugging Face hub where it answers; where it does not, what it gave before, without a minute of retries."""

import functools
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
from huggingface_hub import constants, get_session

SECONDS = 5.0  # that the hub may take to answer
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")  # what can be the name of something there


@contextmanager
def hub_or_cache(name: str) -> Iterator[str]:
    """Where what is loaded by name may come from: the hub, or its cache alone while the hub cannot be reached.

    The libraries ask the hub for each file, five times over with growing pauses, before they look into the cache.

    Args:
        name: what is to be loaded; nothing is asked for a file or folder that is there.

    Yields:
        Why the hub is not asked, for an error's message; nothing where it answers.
    """
    if Path(name).exists() or (not constants.is_offline_mode() and answers(constants.ENDPOINT)):
        yield ""
        return
    switches = [(constants, constants.HF_HUB_OFFLINE), (datasets.config, datasets.config.HF_HUB_OFFLINE)]
    why = (
        "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"the hub ({constants.ENDPOINT}) cannot be reached"
    )
    try:
        for module, _ in switches:
            module.HF_HUB_OFFLINE = True
        yield why
    finally:
        for module, before in switches:
            module.HF_HUB_OFFLINE = before


def answers(endpoint: str) -> bool:
    """Whether the hub can be reached; asked once a minute at most."""
    return _answers(endpoint, int(time.monotonic() // 60))


@functools.lru_cache(maxsize=4)
def _answers(endpoint: str, minute: int) -> bool:
    try:
        return bool(get_session().head(endpoint, timeout=SECONDS).status_code < 500)
    except Exception:  # which errors there are is the affair of the hub's HTTP client, which has changed twice
        return False
