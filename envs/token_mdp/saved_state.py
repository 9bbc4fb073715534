"""Refusing saved states that are another env's, or damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

OLDER = {"group_size": 1}  # what states that do not name it were saved with


def check_identity(state: Any, mine: Mapping[str, Any]) -> None:
    """Refuse what is no saved state, or that of an env that differs from this one in something that `mine` names."""
    saved = state.get("task", {}) if isinstance(state, Mapping) else None
    if not isinstance(saved, Mapping):
        raise ValueError(f"the saved state ({state!r:.80}) must be what state_dict() returned")
    for name, value in mine.items():
        if (given := saved.get(name, OLDER.get(name))) != value:
            raise ValueError(f"the saved state has {name} = {given!s:.80}, this env {value!s:.80}")


@contextmanager
def refusing_damage() -> Iterator[None]:
    """Raise one ValueError for whatever goes wrong while a saved state is read."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"the saved state is damaged: {type(error).__name__}: {error}") from error


def filled(array: npt.NDArray[Any], values: Any) -> npt.NDArray[Any]:
    """An array of saved values like `array` in shape and dtype."""
    given = np.array(values, dtype=array.dtype)
    if given.shape != array.shape:
        raise ValueError(f"shape {given.shape} is saved where {array.shape} is needed")
    return given
