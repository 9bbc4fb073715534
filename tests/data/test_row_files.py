import bz2
import datetime
import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_rlhf.data.row_files import read_rows
from lit_rlhf.errors import UserError

ROW = {"prompt": "é", "completion": " b"}
LINE = b'{"prompt": "a"}\n'
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


def file_of(tmp_path, name, data):
    path = tmp_path / name
    path.write_bytes(data)
    return path


def read(*args):
    return list(read_rows(file_of(*args)))


def parquet(tmp_path, columns):
    table = pa.Table.from_pylist(columns) if isinstance(columns, list) else columns
    pq.write_table(table, tmp_path / "rows.parquet")
    return list(read_rows(tmp_path / "rows.parquet"))


def test_lines_carry_their_numbers_blank_ones_counted(tmp_path):
    places = [place for place, _ in read(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + LINE + b"\n \r\n" + LINE.strip())]
    assert places == [f"{tmp_path / 'a.jsonl'}, line 1", f"{tmp_path / 'a.jsonl'}, line 4"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", json.dumps(ROW).encode().replace(b"\n", b"\r\n")),
        ("a.JSONL", json.dumps(ROW, ensure_ascii=False).encode()),
        ("a.json", json.dumps([ROW], ensure_ascii=False).encode()),
        ("a.ndjson", b"\xef\xbb\xbf \n" + json.dumps([ROW], indent=2).encode()),
        ("a.json.gz", gzip.compress(json.dumps([ROW]).encode(), mtime=0)),
        ("a.jsonl.bz2", bz2.compress(json.dumps(ROW).encode())),
        ("a.csv", "\ufeffprompt,completion\r\né, b\r\n".encode()),
        ("a.tsv.gz", gzip.compress("prompt\tcompletion\né\t b\n".encode(), mtime=0)),
    ],
)
def test_the_same_row_is_read_from_files_of_all_kinds(tmp_path, name, data):
    assert [row for _, row in read(tmp_path, name, data)] == [ROW]


def test_archives_that_were_appended_to_are_read_to_their_end(tmp_path):
    assert len(read(tmp_path, "a.jsonl.gz", gzip.compress(LINE) + gzip.compress(LINE))) == 2


def test_rows_of_an_array_carry_their_number_and_the_line_they_begin_in(tmp_path):
    [(first, _), (second, row)] = read(tmp_path, "a.json", b'[\n{"a":\n 1},\n\n{"a": [2]}\n]\n')
    assert first.endswith("a.json, row 1 (line 2)") and second.endswith("a.json, row 2 (line 5)")
    assert row == {"a": [2]}
    assert read(tmp_path, "a.json", b" [ ]\n") == []


def test_fields_of_csv_may_hold_line_breaks_quotes_and_any_length_and_stand_at_their_first_line(tmp_path):
    long = "x" * 200_000
    rows = read(tmp_path, "a.csv", f'a,b\n"1\n2","say ""so"""\n\n{long},4\n'.encode())
    assert [row for _, row in rows] == [{"a": "1\n2", "b": 'say "so"'}, {"a": long, "b": "4"}]
    assert [place.rpartition(", ")[2] for place, _ in rows] == ["line 2", "line 5"]


def test_columns_of_csv_that_hold_numbers_are_numbers_or_null_where_they_can_be(tmp_path):
    rows = read_rows(file_of(tmp_path, "a.csv", b"a,margin\n1,0.5\n2,\n3,x\n"), numbers=["margin", "absent"])
    assert [row for _, row in rows] == [
        {"a": "1", "margin": 0.5},
        {"a": "2", "margin": None},
        {"a": "3", "margin": "x"},
    ]


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1", 1.0),
        ("-1.", -1.0),
        ("+.5e-3", 5e-4),
        (" 2E2\t", 200.0),
        ("inf", float("inf")),
        ("-Infinity", float("-inf")),
    ],
)
def test_a_cell_is_the_number_that_json_and_c_read(tmp_path, cell, value):
    rows = read_rows(file_of(tmp_path, "a.csv", f"a,margin\n1,{cell}\n".encode()), numbers=["margin"])
    assert [row["margin"] for _, row in rows] == [value]


@pytest.mark.parametrize(
    "cell", ["1_0", "1_000.5", "١", "１", "1e1_0", "0x10", "1\N{NO-BREAK SPACE}", ".", "e5", "1 0", "½"]
)
def test_a_cell_that_python_alone_reads_as_a_number_stays_text(tmp_path, cell):
    rows = read_rows(file_of(tmp_path, "a.csv", f"a,margin\n1,{cell}\n".encode()), numbers=["margin"])
    assert [row["margin"] for _, row in rows] == [cell]


BROKEN_LINES = [
    (b'{"a": 1', r"line 2: not valid JSON \(Expecting ',' delimiter at column 8\)"),
    (b"{'a': 1}", r"line 2: not valid JSON \(Expecting property name .* at column 2\)"),
    (b"[", r"line 2: not valid JSON .* one object per line is expected, not an array over many"),
    (b'{"a": 1}\r{"a": 1}\r', r"line 2: not valid JSON .* its lines end in carriage returns"),
    ('{"a": 1}'.encode("utf-16-le"), r"line 2: not valid JSON .* it holds zero bytes: if it is UTF-16"),
    (b'{"a": "\xe9"}', r"line 2, column 8: not UTF-8 \(byte 0xe9\); save it as UTF-8"),
    ('{"é": "é'.encode() + b"\xff", r"line 2, column 9: not UTF-8 \(byte 0xff\)"),
    (b'{"a": 1, "b": {"c": 1, "c": 1}}', r"line 2: 'c' stands in one object twice; leave one"),
    (
        b'{"a": 1, "b": {"c": [0, -' + b"9" * 5000 + b"]}}",
        r"line 2, column 'b', at c\[1\]: an integer of more than 4300",
    ),
    (b"9" * 5000, r"line 2: an integer of more than 4300 digits"),
    (b"[" * 2000 + b"]" * 2000, r"line 2: nested too deep to be read"),
    (b'{"a": ' * 100_000, r"line 2: nested too deep to be read"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN_LINES)
def test_a_line_that_cannot_be_read_is_named_with_the_column(tmp_path, line, message):
    with pytest.raises(UserError, match=rf"a\.jsonl, {message}"):
        read(tmp_path, "a.jsonl", LINE + line + b"\n" + LINE)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'[{"a": 1},\n{"a": ]', r"line 2: not valid JSON \(Expecting value at column 7\)"),
        (b'[{"a": 1}\n{"a": 1}]', r"line 2: expected a comma or \] after row 1, found '{\"a\": 1}\]'"),
        (b'[{"a": 1},\n{"a": 1}\n', r"line 3: expected a comma or \] after row 2, the file ends: it was cut short"),
        (b'[{"a": 1}]\n{"a": 1}', r"line 1: something follows the \] that ends the array"),
        (b'[{"a": 1},\n{"\xe9": 1}]', r"line 2, column 3: not UTF-8 \(byte 0xe9\)"),
        (b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b"}]", r"row 2 \(line 2\), column 'a': an integer of more than"),
        (b'[{"a": 1},\n{"a": 1, "a": 2}]', r"row 2 \(line 2\): 'a' stands in one object twice"),
        (b'[{"a": 1},\n' + b"[" * 2000 + b"]" * 2001, r"row 2 \(line 2\): nested too deep"),
        (b'{\n  "a": 1\n}', r"line 1: not valid JSON .* one object per line is expected, or all of them in an array"),
    ],
)
def test_what_is_wrong_in_an_array_is_named_by_its_line_in_the_file(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"a\.json, {message}"):
        read(tmp_path, "a.json", data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1\n", "line 2: expected 2 fields, as in the header, found 1"),
        (b'a,b\n"1\n2",3\n1,2,3\n', "line 4: expected 2 fields, as in the header, found 3"),
        (b'a,b\n1,2\n"3,4\n5,6\n', r"line 3: not valid CSV \(unexpected end of data\)"),
        (b'a,b\n1,2\n"3"4,5\n', "line 3: not valid CSV"),
        (b"a,a\n1,2\n", "line 1: two columns are named 'a'; rename one"),
        (b"a;b\n1;2\n", "line 1: expected names parted by ',', found 'a;b'"),
        (b"a,b\n" + b"1,2\n" * 5000 + b"1,\xe9\n", r"line 5002, column 3: not UTF-8 \(byte 0xe9\)"),
        ("a,b\n".encode("utf-16"), "it is UTF-16: save it as UTF-8"),
    ],
)
def test_what_is_wrong_in_a_table_is_named_by_its_line(tmp_path, data, message):
    with pytest.raises(UserError, match=rf"a\.csv(, |: ){message}"):
        read(tmp_path, "a.csv", data)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", gzip.compress(LINE, mtime=0), r"it is gzip: let its name end in \.gz"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(LINE, mtime=0), mtime=0),
            r"unpack it, within it is gzip: let its name end in \.gz",
        ),
        (
            "a.jsonl.gz.gz",
            gzip.compress(gzip.compress(LINE, mtime=0), mtime=0),
            r"unpack it, within it is gzip: let its",
        ),
        ("a.csv.bz2", bz2.compress(b"PK\x03\x04"), "unpack it, within it is a zip archive: unpack it first"),
        ("a.csv", LFS, r"it is a pointer of Git LFS: fetch the file itself \(git lfs pull\)"),
        ("a.csv.gz", gzip.compress(LFS, mtime=0), "unpack it, within it is a pointer of Git LFS"),
        ("a.parquet", LFS, r"cannot be read \(.* it is a pointer of Git LFS: fetch the file itself"),
        ("a.jsonl.gz", LINE, r"cannot be read .* it is not compressed: leave \.gz out of its name"),
        ("a.jsonl.gz", bz2.compress(LINE), r"cannot be read .* it is bzip2: let its name end in \.bz2"),
        ("a.jsonl", b"PAR1\x15", r"it is Parquet: let its name end in \.parquet"),
        (
            "a.parquet",
            LINE,
            r"cannot be read \(Parquet magic bytes not found .* it is not Parquet: let its name end as what it is",
        ),
        ("a.parquet", b"", r"cannot be read \(Parquet file size is 0 bytes\); copy it anew"),
        ("a.jsonl", b"PK\x03\x04", "it is a zip archive: unpack it first"),
        ("a.jsonl", LFS, "it is a pointer of Git LFS: fetch"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "it is UTF-16: save it as UTF-8"),
        ("a.jsonl", LINE.decode().encode("utf-32"), "it is UTF-32: save it as UTF-8"),
    ],
)
def test_a_file_of_another_kind_than_its_name_says_is_named_with_what_to_do(tmp_path, name, data, message):
    with pytest.raises(UserError, match=rf"{name}(, |: ){message}"):
        read(tmp_path, name, data)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst"])
def test_an_archive_cut_short_is_named_with_the_last_line_that_was_whole(tmp_path, name):
    rng = np.random.default_rng(0)
    rows = b"".join(b'{"a": "%s"}\n' % rng.bytes(30).hex().encode() for _ in range(40_000))
    with pa.output_stream(str(tmp_path / name), compression="detect") as stream:
        stream.write(rows)
    assert len(list(read_rows(tmp_path / name))) == 40_000
    with pytest.raises(UserError, match=rf"{name}: cannot be read after line \d{{5}} \(Truncated .*\); copy it anew"):
        read(tmp_path, name, (tmp_path / name).read_bytes()[:-9])


def test_parquet_is_read_whatever_its_types(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"]).dictionary_encode(),
            "completion": pa.array(["c", "d"], pa.large_string()),
            "nothing": pa.nulls(2),
            "messages": [[{"role": "user", "content": "q", "tools": None}], None],
            "sent": [datetime.datetime(2024, 1, 1)] * 2,
        }
    )
    (place, row), _ = parquet(tmp_path, table)
    assert place == f"{tmp_path / 'rows.parquet'}, row 1"
    assert (row["prompt"], row["completion"], row["nothing"]) == ("a", "c", None)
    assert row["messages"] == [{"role": "user", "content": "q", "tools": None}]


def not_utf8(rows):
    """A string column whose last value is no text."""
    data = b"ok" * (rows - 1) + b"\xff\xfe"
    ends = np.arange(0, 2 * rows + 1, 2, dtype=np.int32)
    return pa.Array.from_buffers(pa.string(), rows, [None, pa.py_buffer(ends), pa.py_buffer(data)])


def test_values_of_parquet_that_python_cannot_hold_are_named_by_row_and_column(tmp_path):
    with pytest.raises(UserError, match=r"rows\.parquet, row 1500, column 'x': text that is not UTF-8 .*; mend it, or"):
        parquet(tmp_path, pa.table({"prompt": ["a"] * 1500, "x": not_utf8(1500)}))
    nested = pa.StructArray.from_arrays([not_utf8(2)], names=["content"])
    with pytest.raises(UserError, match="row 2, column 'm': text that is not UTF-8"):
        parquet(tmp_path, pa.table({"m": nested}))
    with pytest.raises(UserError, match=r"row 1, column 'day': a date32\[day\] that Python cannot hold"):
        parquet(tmp_path, pa.table({"day": pa.array([2**30], pa.date32())}))
    with pytest.raises(UserError, match=r"row 1, column 'at': a timestamp\[us, tz=No/Where\] that Python cannot hold"):
        parquet(tmp_path, pa.table({"at": pa.array([1], pa.timestamp("us", tz="No/Where"))}))
    with pytest.raises(UserError, match="row 1: 2 columns are named 'a'; rename all but one"):
        parquet(tmp_path, pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["a", "a"]))


def test_damaged_parquet_is_named(tmp_path):
    parquet(tmp_path, [{"a": str(i) * 50} for i in range(3000)])
    data = (tmp_path / "rows.parquet").read_bytes()
    with pytest.raises(UserError, match=r"cut\.parquet: cannot be read"):
        read(tmp_path, "cut.parquet", data[:-9])
    with pytest.raises(UserError, match=r"page\.parquet: cannot be read \(Corrupt snappy compressed data\.\); copy it"):
        read(tmp_path, "page.parquet", data[:40] + b"\xff" * 60 + data[100:])


def test_parquet_whose_pages_carry_checksums_is_held_to_them(tmp_path):
    plain = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"a": ["one", "two", "three"]}), tmp_path / "rows.parquet", **plain)
    data = (tmp_path / "rows.parquet").read_bytes()
    assert data.count(b"three") == 1, "in the values alone, not in statistics"
    with pytest.raises(UserError, match=r"flipped\.parquet: cannot be read \(.*CRC"):
        read(tmp_path, "flipped.parquet", data.replace(b"three", b"trees"))
