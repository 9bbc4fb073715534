"""What people return from reward functions."""

import gc
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas
import pytest
import torch

from token_mdp.answers import as_numbers, shown, told


async def later():
    return [1.0, 2.0, 3.0]


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no")


class BrokenArray:
    def __array__(self, *args, **kwargs):
        raise TypeError("no array")

    def __repr__(self):
        return "Broken\n  array"


NUMBERS = [1.0, 0.0, 2.0]
TAKEN = {
    "list": [1.0, 0, 2],
    "tuple": (1, 0, 2),
    "booleans beside numbers": [True, False, 2.0],
    "array of integers": np.array([1, 0, 2], dtype=np.int8),
    "half precision": np.array(NUMBERS, dtype=np.float16),
    "0-d arrays": [np.array(1.0), np.array(0), np.array(2.0)],
    "numpy scalars": [np.float32(1), np.int64(0), np.float64(2)],
    "tensor": torch.tensor(NUMBERS),
    "tensor with a gradient": torch.tensor(NUMBERS, requires_grad=True),
    "bfloat16 tensor": torch.tensor(NUMBERS, dtype=torch.bfloat16),
    "bool tensor beside numbers": [torch.tensor(True), torch.tensor(False), torch.tensor(2)],
    "0-d tensors with a gradient": list(torch.tensor(NUMBERS, requires_grad=True)),
    "0-d bfloat16 tensors": list(torch.tensor(NUMBERS, dtype=torch.bfloat16)),
    "decimals": [Decimal("1"), Decimal("0"), Decimal("2.0")],
    "fractions": [Fraction(2, 2), Fraction(0), Fraction(4, 2)],
    "a masked array that hides nothing": np.ma.array(NUMBERS),
    "pandas": pandas.Series(NUMBERS, index=[5, 6, 7]),
    "a range": [*range(1, 2), *range(1), *range(2, 3)],
}


@pytest.mark.parametrize("returned", TAKEN.values(), ids=TAKEN)
@pytest.mark.parametrize("abstain", [False, True])
def test_numbers_of_any_kind_are_taken(returned, abstain):
    values, answered = as_numbers(returned, 3, abstain)
    assert values.dtype == np.float64 and values.tolist() == NUMBERS and answered.all()


REFUSED = {
    "nothing": (None, "None"),
    "one number": (1.0, "shape ()"),
    "0-d array": (np.array(1.0), "shape ()"),
    "0-d tensor": (torch.tensor(1.0), "shape ()"),
    "too few": ([1.0, 2.0], "shape (2,)"),
    "too many": ([1.0] * 4, "shape (4,)"),
    "none at all": ([], "shape (0,)"),
    "a column": ([[1.0], [2.0], [3.0]], "shape (3, 1)"),
    "one-element tensors": ([torch.ones(1)] * 3, "shape (3, 1)"),
    "a column tensor": (torch.ones(3, 1), "shape (3, 1)"),
    "lists of unequal lengths": ([[1.0], [2.0, 3.0], []], "[[1.0], [2.0, 3.0], []]"),
    "text": (["1.0", "2", "good"], "['1.0', '2', 'good']"),
    "one text": ("123", "'123'"),
    "bytes": (b"123", "b'123'"),
    "text beside a number": ([1.0, "2", 3.0], "[1.0, '2', 3.0]"),
    "text in an array of objects": (np.array([1.0, "2", None], dtype=object), "array([1.0, '2', None], dtype=object)"),
    "complex": ([1.0, 2j, 3.0], "complex numbers"),
    "a complex tensor": (torch.ones(3, dtype=torch.complex64), "complex numbers"),
    "complex beside nothing": (np.array([1.0, 2j, "x"], dtype=object), "array([1.0, 2j, 'x'], dtype=object)"),
    "dict": ({0: 1.0, 1: 2.0, 2: 3.0}, "{0: 1.0, 1: 2.0, 2: 3.0}"),
    "list of dicts": ([{"score": 1.0}] * 3, "[{'score': 1.0}, {'score': 1.0}, {'score': 1.0}]"),
    "set": ({1.0}, "{1.0}"),
    "dates": (np.array(["2026-01-01"] * 3, dtype="datetime64[D]"), "array(['2026-01-01', '2026-01-01', '2026-01-01']"),
    "pairs": ([(1.0, "why"), (2.0, "why"), (3.0, "why")], "[(1.0, 'why'), (2.0, 'why'), (3.0, 'why')]"),
    "None beside numbers": (
        [1.0, None, 2.0],
        "[1.0, None, 2.0]; None, for a response of which there is nothing to say",
    ),
    "a number that a mask hides": (np.ma.array([1.0, 5.0, 2.0], mask=[0, 1, 0]), "masked_array(data=[1.0, --, 2.0]"),
    "a masked number beside others": ([1.0, np.ma.masked, 2.0], "[1.0, masked, 2.0]; None, for a response"),
    "complex under a mask": (np.ma.array([1j, 2j, 3j]), "complex numbers"),
    "an integer beyond all floats": ([10**400, 1, 2], f"[1{'0' * 75}..."),
    "an integer of thousands of digits": ([10**9999, 1, 2], "a list"),
    "a decimal that signals": ([Decimal("sNaN"), 1, 2], "[Decimal('sNaN'), 1, 2]"),
    "missing values of pandas": (pandas.Series([1, None, "x"], dtype=object), "0 1 1 None 2 x dtype: object"),
    "a generator": ((float(i) for i in range(3)), "a generator; return a list of what it yields"),
    "map": (map(float, range(3)), "a map; return a list of what it yields"),
    "zip": (zip([1.0], [2.0], strict=True), "a zip; return a list of what it yields"),
    "a coroutine": (later(), "something to await; run an async function to its end in a plain one"),
    "a function": (len, "<built-in function len>"),
    "a class": (float, "<class 'float'>"),
    "an exception": (ValueError("no"), "ValueError('no')"),
    "an unprintable": (Unprintable(), "a Unprintable"),
    "an array that fails": (BrokenArray(), "Broken array"),
    "a sparse tensor": (torch.eye(3).to_sparse(), "tensor(indices=tensor([[0, 1, 2], [0, 1, 2]])"),
    "a tensor without data": (torch.ones(3, device="meta"), "tensor(..., device='meta', size=(3,))"),
    "tensors without data": ([torch.ones((), device="meta")] * 3, "[tensor(..., device='meta', size=())"),
}


@pytest.mark.parametrize(("returned", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_number_per_response_is_refused_in_one_line_that_shows_it(returned, said):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as error:
            as_numbers(returned, 3, abstain=False)
        gc.collect()  # a coroutine that nobody waited for warns when it goes
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200


def test_none_abstains_where_that_is_allowed():
    values, answered = as_numbers([1.0, None, float("nan"), Decimal(2), np.array(3), True], 6, abstain=True)
    assert answered.tolist() == [True, False, True, True, True, True]
    np.testing.assert_array_equal(values, [1.0, np.nan, np.nan, 2.0, 3.0, 1.0])
    for hidden in (np.ma.array([1.0, 5.0, 2.0], mask=[0, 1, 0]), [1.0, np.ma.masked, np.ma.array(2)]):
        values, answered = as_numbers(hidden, 3, abstain=True)
        assert answered.tolist() == [True, False, True] and values[answered].tolist() == [1.0, 2.0]
    values, answered = as_numbers([None] * 3, 3, abstain=True)
    assert np.isnan(values).all() and not answered.any()
    for returned in (None, ["x", None, 1.0], [None, [None], 1.0]):
        with pytest.raises(ValueError):
            as_numbers(returned, 3, abstain=True)


def test_values_and_exceptions_are_told_in_one_short_line():
    assert shown("a\n  b") == r"'a\n b'" and len(shown("x" * 999)) == 80
    assert told(ValueError("first\n\tsecond")) == "ValueError: first second"
    assert told(SystemExit(0)) == "SystemExit: 0" and told(SystemExit()) == "SystemExit"
    assert told(KeyError("answer")) == "KeyError: 'answer'" and len(told(ValueError("x" * 999))) < 320

    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    assert told(Mute()) == "Mute"
