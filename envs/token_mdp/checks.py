"""Refusing arguments that mean nothing, with the name and the value as the user typed them."""

from __future__ import annotations

import os
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt


class ArgumentError(ValueError, TypeError):
    """An argument, or a render mode, that the env does not have.

    A TypeError besides, since TorchRL asks every id for a `frameskip`, and does without upon that error alone.
    """

    def __init__(self, message: str) -> None:
        # `gymnasium.make` raises a TypeError again with all arguments in its text, whole data sets of prompts.
        super().__init__(message.partition(" was raised from the environment creator")[0])


def check_count(name: str, value: Any) -> int:
    """A positive integer as an int, which saved states can hold whatever NumPy type it came in."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be an integer and at least 1")
    return int(value)


def check_room(num_slots: int, width: int, vocab_size: int, masks: bool, named: str) -> None:
    """Refuse sizes that this machine's memory cannot hold, before any of it is taken.

    Args:
        num_slots: B.
        width: P+T.
        vocab_size: V.
        masks: whether each slot has a mask of V tokens.
        named: the sizes as the user gave them, for the error's text.
    """
    # A cell is 9 bytes of the observation, as many of its copy, and 30 of the bounds of the spaces; a token is in the
    # table of stop tokens, and in a bool and an int8 mask of each slot.
    needed = num_slots * width * 48 + vocab_size * (1 + 2 * num_slots * masks)
    memory = _memory()
    if memory is not None and needed > memory:
        raise ValueError(f"{named} would take about {needed / 1e9:,.0f} GB; this machine has {memory / 1e9:,.0f} GB")


def _memory() -> int | None:
    """Bytes of memory that the machine has, where the system tells."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def check_share(name: str, value: Any) -> None:
    """Refuse what is no number in 0..1."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= value <= 1.0:  # type: ignore[operator]
        raise ValueError(f"{name} ({value!r}) must be a number in 0..1")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {choices}")


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} ({value!r}) must be True or False")


def check_render_mode(value: Any, modes: list[str]) -> None:
    """Refuse what is neither None nor one of the modes."""
    if value is not None and (not isinstance(value, str) or value not in modes):
        raise ArgumentError(f"render_mode ({value!r}) must be None or one of {modes}")


def check_function(name: str, value: Any) -> None:
    """Refuse what is neither None nor a function."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} ({value!r}) must be None or a function (prompts, responses, **columns) -> (n,)")


def as_array(value: Any) -> npt.NDArray[Any]:
    """`np.asarray`; of sequences of unequal lengths, which it refuses, and of masked values objects: never numbers."""
    if np.ma.is_masked(value):
        return np.array(value.tolist(), dtype=object)  # None where it is masked
    try:
        return np.asarray(value)
    except ValueError:
        return np.fromiter(value, dtype=object)
