import pytest

from lit_rlhf.data.naming import Source, parse_sources
from lit_rlhf.errors import UserError


def test_sources_are_named_in_four_forms():
    assert parse_sources("demo") == [Source("demo")]
    assert parse_sources(["a", "b"]) == [Source("a"), Source("b")]
    assert parse_sources({"a": 2.0}) == [Source("a", 2.0)]
    assert parse_sources([{"source": "a", "weight": 0.5, "split": "s"}]) == [Source("a", 0.5, "s")]
    with pytest.raises(UserError, match="keys source, weight, split, config, format, columns; found \\['sauce'\\]"):
        parse_sources([{"sauce": "a"}])
    with pytest.raises(UserError, match=r"weight \(0\) of a must be a number above 0"):
        parse_sources({"a": 0})
    with pytest.raises(UserError, match="empty"):
        parse_sources([])


def test_a_single_mapping_is_a_source_where_it_names_one():
    assert parse_sources({"source": "a", "weight": 2}) == [Source("a", 2.0)]
    assert parse_sources([Source("a")]) == [Source("a")]


def test_format_and_columns_are_those_of_the_source_or_of_all():
    columns = {"prompt": "question"}
    both = [{"source": "a", "format": "sharegpt", "columns": {}}, "b"]
    assert parse_sources(both, "alpaca", columns) == [
        Source("a", format="sharegpt"),
        Source("b", format="alpaca", columns=columns),
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": float("nan")}, r"data.train: weight \(nan\) of a must be a number above 0, and finite"),
        ({"a": float("inf")}, r"weight \(inf\) of a"),
        ({"a": -1}, r"weight \(-1\) of a"),
        ({"a": "much"}, r"weight \('much'\) of a"),
        ({"a": "1_0"}, r"weight \('1_0'\) of a"),
        ({"a": True}, r"weight \(True\) of a"),
        ({"a": 10**400}, r"weight \(10{39}\.\.\.\) of a"),
        ([{"source": "a", "weight": None}], r"weight \(None\) of a"),
        ([{"source": "a", "wait": 2}], r"data.train: a source has the keys .*; found \['source', 'wait'\]"),
        ([{"source": "a", "split": 5}], r"split \(5\) of a must be a name"),
        ([{"source": "a", "format": "vicuna"}], r"format \('vicuna'\) of a must be alpaca or sharegpt, or null"),
        ([{"source": "a", "columns": ["prompt"]}], r"columns \(\['prompt'\]\) of a must map our names to the file's"),
        ([{"source": "a", "columns": {"prompt": 5}}], r"columns \({'prompt': 5}\) of a must map"),
        ("", "data.train: expected the name of a file, a folder or a dataset, or 'demo'; got ''"),
        ([None], "expected the name .* got None"),
        ([["a"]], r"expected the name .* got \['a'\]"),
        ({}, "data.train: the list of sources is empty"),
    ],
)
def test_a_slip_in_naming_sources_is_told_with_the_option(given, message):
    with pytest.raises(UserError, match=message):
        parse_sources(given, option="data.train")
