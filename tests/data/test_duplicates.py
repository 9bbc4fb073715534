import numpy as np
import pyarrow as pa

from lit_rlhf.data.duplicates import digest, digests, numbered, repeats

LISTS = pa.list_(pa.int32())


def table(*rows):
    prompts, responses = zip(*rows, strict=True)
    return pa.table({"prompt": pa.array(prompts, LISTS), "response": pa.array(responses, LISTS)})


def test_rows_are_the_same_if_all_of_their_columns_are_and_not_if_only_their_tokens_in_a_row():
    found = digests(table(([1, 2], [3]), ([1], [2, 3]), ([1, 2], [3]), ([1, 2], [4])), ["prompt", "response"])
    assert repeats(found).tolist() == [False, False, True, False]
    assert numbered(found).tolist() == [0, 1, 0, 2]


def test_only_the_columns_that_are_named_count_and_empty_lists_are_alike():
    found = digests(table(([], [3]), ([], [4]), ([1], [])), ["prompt"])
    assert repeats(found).tolist() == [False, True, False]


def test_a_column_of_a_table_has_the_digest_of_its_array():
    assert digests(table(([7, 8], [])), ["prompt"]) == [digest([np.array([7, 8], dtype=np.int32)])]
