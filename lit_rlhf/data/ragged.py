"""Columns of Arrow that hold a list in each row, as arrays."""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

ROWS = 128  # of a table that are looked at together


def parts(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """A column in runs of rows, so that what is computed of them is never there for all tokens at once."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), ROWS):
            yield chunk.slice(start, ROWS)


def ragged(column: pa.ChunkedArray) -> list[np.ndarray]:
    """A column of lists as arrays, views of one buffer where the type allows; token ids as int64."""
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    if values.dtype != bool:
        values = values.astype(np.int64)
    ends = np.cumsum(pc.list_value_length(lists).to_numpy()).tolist()
    return [values[start:end] for start, end in itertools.pairwise([0, *ends])]
