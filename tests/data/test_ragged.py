import numpy as np
import pyarrow as pa

from lit_rlhf.data.ragged import ROWS, parts, ragged


def test_lists_come_back_whatever_chunks_hold_them():
    column = pa.chunked_array([pa.array([[1, 2], []], pa.list_(pa.int32())), pa.array([[3]], pa.list_(pa.int32()))])
    assert [ids.tolist() for ids in ragged(column)] == [[1, 2], [], [3]]
    assert ragged(column)[0].dtype == np.int64
    masks = pa.chunked_array([pa.array([[True, False]], pa.list_(pa.bool_()))])
    assert ragged(masks)[0].tolist() == [True, False] and ragged(masks)[0].dtype == bool


def test_parts_hold_each_row_once_and_never_too_many():
    column = pa.chunked_array([pa.array([[i] for i in range(2 * ROWS + 1)])])
    runs = list(parts(column))
    assert max(map(len, runs)) == ROWS
    assert [row for run in runs for row in run.to_pylist()] == [[i] for i in range(2 * ROWS + 1)]
