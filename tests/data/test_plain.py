import datetime
import decimal
import json
import uuid

import pytest

from lit_rlhf.data.plain import as_json, find, require_text
from lit_rlhf.errors import UserError


def test_a_row_is_json_with_times_and_decimals_as_their_text():
    row = {
        "at": datetime.datetime(2024, 1, 2, 3, 4),
        "day": datetime.date(2024, 1, 2),
        "price": decimal.Decimal("1.50"),
        "id": uuid.UUID(int=1),
        "é": [1, 0.5, True, None, {"x": "😀"}],
    }
    assert json.loads(as_json(row, "here")) == row | {
        "at": "2024-01-02 03:04:00",
        "day": "2024-01-02",
        "price": "1.50",
        "id": "00000000-0000-0000-0000-000000000001",
    }


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "w3 \ud83d"}, r"here, column 'prompt': '\\ud83d' is half of a character, which UTF-8 cannot hold"),
        ({"m": [{"a": 1}, {"b": {"c": "\udc00"}}]}, r"here, column 'm', at \[1\]\.b\.c: '\\udc00' is half"),
        ({"m": {"\ud800": 1}}, r"here, column 'm', at \\ud800: '\\ud800' is half"),
        ({"m": [{"image": b"x"}]}, r"here, column 'm', at \[0\]\.image: expected text, .*; found bytes; convert it"),
        ({"m": {1, 2}}, "here, column 'm': expected text, .*; found set"),
    ],
)
def test_what_json_cannot_hold_is_named_by_its_place_in_the_row(row, message):
    with pytest.raises(UserError, match=message) as caught:
        as_json(row, "here")
    str(caught.value).encode()


def test_a_row_nested_without_end_is_refused():
    nested = []
    for _ in range(3000):
        nested = [nested]
    for check in (as_json, require_text):
        with pytest.raises(UserError, match="here: nested too deep"):
            check({"x": nested}, "here")


def test_columns_that_are_only_carried_along_may_hold_anything_but_text_that_cannot_be_written():
    require_text({"image": b"x", "when": datetime.datetime(2024, 1, 1), "f": find}, "here")
    with pytest.raises(UserError, match=r"here, column 'x', at \[0\]: '\\ud800' is half"):
        require_text({"image": b"x", "x": ["\ud800"]}, "here")
