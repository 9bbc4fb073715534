"""Rows of the same content, found by a digest of their tokens: repeats within some data, and leaks into others."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import xxhash

from lit_rlhf.data.ragged import ROWS


def contents(table: Any) -> list[bytes]:
    """A digest of each tokenised row: of its tokens, which of them are learnt, and what its steps are known to be."""
    return digests(table, [name for name in table.column_names if name.endswith(("_ids", "_mask")) or name == "labels"])


def digests(table: Any, columns: Sequence[str]) -> list[bytes]:
    """A digest of each row: two rows have the same one if these columns hold the same lists, and else by no chance.

    Args:
        table: of Arrow, n rows.
        columns: of lists of numbers.

    Returns:
        n of 16 bytes.
    """
    found: list[bytes] = []
    for batch in table.select(list(columns)).to_batches(max_chunksize=ROWS):
        arrays = [
            np.split(column.flatten().to_numpy(zero_copy_only=False), np.cumsum(pc.list_value_length(column))[:-1])
            for column in batch.columns
        ]
        found += [digest(row) for row in zip(*arrays, strict=True)]
    return found


def digest(arrays: Iterable[np.ndarray]) -> bytes:
    """One of some arrays, in their order; where one ends and the next begins counts."""
    found = xxhash.xxh3_128()
    for array in arrays:
        found.update(b"%d " % len(array))
        found.update(array.tobytes())
    return found.digest()


def numbered(found: Sequence[bytes]) -> np.ndarray:
    """(n,) the same number for rows of the same digest, counted in the order in which they come first."""
    numbers: dict[bytes, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in found], dtype=np.int64)


def repeats(found: Sequence[bytes]) -> np.ndarray:
    """(n,) bool: the rows of which the like came before."""
    first = np.zeros(len(found), dtype=bool)
    first[np.unique(numbered(found), return_index=True)[1]] = True
    return ~first
