"""What a reward function answered, as numbers, or words for what it answered instead."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from token_mdp.episodes import FloatArray

NO_NUMBER = float("nan")  # in place of None


def as_numbers(returned: Any, count: int, abstain: bool) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    """One real number per response.

    Taken are lists, arrays and tensors, on any device, of integers, floats, booleans, fractions and decimals. What a
    masked array hides is None.

    Args:
        returned: by the function.
        count: n, responses that it was asked about.
        abstain: whether None among them means that the function has nothing to say of this response.

    Returns:
        (n,) float64, a copy, NaN for None; and (n,) True where it answered, if only by a NaN of its own.

    Raises:
        ValueError: it is something else; the message says what.
    """
    if inspect.isawaitable(returned):
        if hasattr(returned, "close"):
            returned.close()  # else Python warns that nobody waited for it
        raise ValueError("something to await; run an async function to its end in a plain one, as by asyncio.run")
    if isinstance(returned, Iterator):
        raise ValueError(f"a {type(returned).__name__}; return a list of what it yields")
    try:
        given = _plain(returned)
        if isinstance(given, list | tuple):
            given = [_plain(element) for element in given]
        answers = np.asarray(given)
    except (
        Exception
    ) as error:  # lists of unequal lengths, tensors without data, whatever an object of the user's raises
        raise ValueError(shown(returned)) from error
    if returned is None or answers.dtype.kind not in "biufO":
        raise ValueError("complex numbers" if answers.dtype.kind == "c" else shown(returned))
    if answers.shape != (count,):
        raise ValueError(shown(returned) if answers.dtype.kind == "O" else f"shape {answers.shape}")
    if answers.dtype.kind == "O":
        values = np.array([_number(answer, abstain, returned) for answer in answers.tolist()])
        return values, np.array([answer is not None for answer in answers.tolist()])
    # A copy keeps the caller's buffer apart from ours.
    return np.array(answers, dtype=np.float64), np.ones(count, dtype=np.bool_)


def _number(answer: Any, abstain: bool, returned: Any) -> float:
    if isinstance(answer, np.ndarray) and answer.ndim == 0:
        answer = answer.item()
    if answer is None and abstain:
        return NO_NUMBER
    try:
        if isinstance(answer, Real | Decimal):
            return float(answer)
    except (OverflowError, ValueError):  # an integer beyond all floats, a Decimal that signals
        pass
    hint = "; None, for a response of which there is nothing to say, is taken with abstain=True"
    raise ValueError(f"{shown(returned)}{hint if answer is None else ''}")


def _plain(returned: Any) -> Any:
    """Without torch, and without numbers that a mask hides, which `np.asarray` would bring back."""
    given = without_torch(returned)
    return given.tolist() if isinstance(given, np.ma.MaskedArray) else given


def without_torch(returned: Any) -> Any:
    """A torch tensor, perhaps bfloat16, on a GPU or with a gradient, as an array; anything else as it is."""
    if not hasattr(returned, "detach"):  # torch itself is not imported
        return returned
    tensor = returned.detach().cpu()
    try:
        return tensor.numpy()
    except TypeError:  # NumPy knows no bfloat16
        return tensor.float().numpy()


def shown(value: Any) -> str:
    """A value in one short line for an error's text."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, or a `__repr__` of the user's that fails
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def told(error: BaseException) -> str:
    """An exception in one line."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    said = said if len(said) <= 300 else f"{said[:297]}..."
    return f"{type(error).__name__}: {said}" if said else type(error).__name__
