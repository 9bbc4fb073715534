"""The micro-batches of an epoch: which examples each holds, made when they are asked for.

Axes: n examples, m micro-batches, B examples of one.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, overload

import numpy as np


class MicroBatch(NamedTuple):
    """Which examples a micro-batch holds; `dataset[micro_batch]` packs them."""

    indices: np.ndarray  # (B,) int64
    denominator: float  # divides the sum of its losses
    # Of the first of an optimiser step: the indices of all of this rank's; of the others none; None = it stands alone.
    step: tuple[np.ndarray, ...] | None = None


class Plan(Sequence[MicroBatch]):
    """Micro-batches of an epoch, each made when it is asked for.

    Args:
        rows: (n,) int64 examples of all micro-batches, one after the other.
        ends: (m + 1,) where each begins among them, and the last ends.
        denominators: (m,) float64.
        numbers: which of these m micro-batches there are, in order; None = all.
    """

    def __init__(
        self, rows: np.ndarray, ends: np.ndarray, denominators: np.ndarray, numbers: range | None = None
    ) -> None:
        self.rows, self.ends, self.denominators = rows, ends, denominators
        self.numbers = range(len(denominators)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, at: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, at: slice) -> "Plan": ...
    def __getitem__(self, at: int | slice) -> "MicroBatch | Plan":
        if isinstance(at, slice):
            return Plan(self.rows, self.ends, self.denominators, self.numbers[at])
        number = self.numbers[at]
        return MicroBatch(self.rows[self.ends[number] : self.ends[number + 1]], float(self.denominators[number]))


def flat(batches: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) examples of all micro-batches in a row, and (batches + 1,) where each begins and the last ends."""
    ends = np.cumsum([0, *map(len, batches)])
    return np.fromiter(itertools.chain.from_iterable(batches), np.int64, ends[-1]), ends
