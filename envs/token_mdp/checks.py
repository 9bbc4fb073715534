"""Refusing arguments that mean nothing, with the name and the value as the user typed them."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_count(name: str, value: Any) -> None:
    """Refuse what is not a positive integer."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} ({value!r}) must be an integer and at least 1")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} ({value!r}) must be one of {choices}")


def check_function(name: str, value: Any) -> None:
    """Refuse what is neither None nor a function."""
    if value is not None and not callable(value):
        raise ValueError(f"{name} ({value!r}) must be None or a function (prompts, responses, **columns) -> (n,)")
