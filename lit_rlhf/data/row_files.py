"""Files of rows, read one by one: JSON Lines, arrays in JSON, CSV and Parquet, compressed or not.

Each row comes with its place, for whatever is to be said of it: file and line, in Parquet file and row. What cannot be
read is an error that names them; a file is searched for the place once something has failed, not before.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from lit_rlhf.data.plain import find
from lit_rlhf.errors import UserError

LINES = (".jsonl", ".json", ".ndjson")
TABLES = {".csv": ",", ".tsv": "\t"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
ENDINGS = (*(ending + packed for ending in (*LINES, *TABLES) for packed in ("", *COMPRESSIONS)), ".parquet")
EXPECTED_FILES = (
    f"JSON Lines, JSON, CSV or Parquet ({', '.join((*LINES, *TABLES))}, plain or .gz, .zst, .bz2; .parquet)"
)
# As other programs read it; Python's own would take 1_0 for 10, and digits of all scripts.
NUMBER = re.compile(r"\s*[+-]?((\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|inf|infinity)\s*", re.ASCII | re.IGNORECASE)
PARQUET_BATCH = 1024  # rows that Python holds at once

# What a file begins with whose name should end in something else, and what is to be done then.
MAGIC = {
    b"\x1f\x8b": "gzip: let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "zstd: let its name end in .zst",
    b"BZh": "bzip2: let its name end in .bz2",
    b"\xfd7zXZ": "xz: unpack it first (unxz)",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"PAR1": "Parquet: let its name end in .parquet",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"ARROW1": "Arrow: save it as Parquet",
    b"\xff\xfe\x00\x00": "UTF-32: save it as UTF-8 (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
}


class _NameTwice(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):  # which of them was meant, nobody knows
        names = [name for name, _ in pairs]
        raise _NameTwice(f"{next(name for name in found if names.count(name) > 1)!r} stands in one object twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def read_rows(file: Path, numbers: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """Place and value of each row of a file, by what its name ends in.

    Args:
        file: to be read.
        numbers: columns that are numbers or null; CSV itself knows text alone.

    Raises:
        UserError: something that cannot be read, with its place.
    """
    ending, *_ = _endings(file)
    try:
        if ending == ".parquet":
            yield from _parquet(file)
            return
        with _opened(file) as content:
            _refuse_other(file, content.peek(4096))
            if ending in TABLES:
                yield from _table(file, content, TABLES[ending], numbers)
            elif content.peek(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                yield from _array(file, content)
            else:
                yield from _lines(file, content)
    except (pa.ArrowException, OSError) as error:
        _cannot_be_read(file, error)


def rows_of(table: pa.Table | pa.RecordBatch, place: Callable[[int], str]) -> Iterator[tuple[str, Any]]:
    """Place and value of each row of an Arrow table.

    Args:
        table: of any types.
        place: where row i of it stands.

    Raises:
        UserError: a value that Python cannot hold, such as text that is not UTF-8.
    """
    names = table.schema.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{place(0)}: {names.count(twice)} columns are named {twice!r}; rename all but one")
    try:
        rows = table.to_pylist()
    except Exception:  # each type has errors of its own: bytes in text, dates out of range, unknown time zones
        rows = _cell_by_cell(table, place)
    for number, row in enumerate(rows):
        yield place(number), row


def _cell_by_cell(table: pa.Table | pa.RecordBatch, place: Callable[[int], str]) -> Iterator[Any]:
    for number in range(table.num_rows):
        row = {}
        for name, column in zip(table.schema.names, table.columns, strict=True):
            try:
                row[name] = column[number].as_py()
            except Exception as error:
                not_utf8 = isinstance(error, UnicodeDecodeError)
                what = "text that is not UTF-8" if not_utf8 else f"a {column.type} that Python cannot hold"
                raise UserError(
                    f"{place(number)}, column {name!r}: {what} ({error}); mend it, or leave the column out"
                ) from error
        yield row


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    done = 0
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        for batch in parquet.iter_batches(batch_size=PARQUET_BATCH):
            yield from rows_of(batch, lambda number, first=done + 1: f"{file}, row {first + number}")  # type: ignore[misc]
            done += batch.num_rows


def _lines(file: Path, content: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        for number, line in enumerate(content, 1):
            if text := _decoded(file, line, number).rstrip():
                place = f"{file}, line {number}"
                yield place, _parsed(file, text, place, first_line=number)
    except OSError as error:
        _cannot_be_read(file, error, f" after line {number}")


def _array(file: Path, content: io.BufferedReader) -> Iterator[tuple[str, Any]]:
    text = _decoded(file, content.read(), 1)
    skip = re.compile(r"\s*").match
    number, line, counted = 0, 1, 0
    at = skip(text, text.index("[") + 1).end()  # type: ignore[union-attr]
    more = not text.startswith("]", at)
    while more:
        number, line, counted = number + 1, line + text.count("\n", counted, at), at
        place = f"{file}, row {number} (line {line})"
        row, at = _parsed(file, text, place, at=at)
        yield place, row
        at = skip(text, at).end()  # type: ignore[union-attr]
        if more := text.startswith(",", at):
            at = skip(text, at + 1).end()  # type: ignore[union-attr]
    line += text.count("\n", counted, at)
    if not text.startswith("]", at):
        found = f"found {text[at : at + 20]!r}" if at < len(text) else "the file ends: it was cut short, copy it anew"
        raise UserError(f"{file}, line {line}: expected a comma or ] after row {number}, {found}")
    if text[at + 1 :].strip():
        raise UserError(f"{file}, line {line}: something follows the ] that ends the array; one array is expected")


def _table(
    file: Path, content: io.BufferedReader, delimiter: str, numbers: Collection[str]
) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # else 128 KB
    reader = csv.reader(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    line = 1
    try:
        for values in reader:
            place, line = f"{file}, line {line}", reader.line_num + 1
            if not names:
                names = values
                if twice := [name for name in names if names.count(name) > 1]:
                    raise UserError(f"{place}: two columns are named {twice[0]!r}; rename one")
                if len(names) == 1 and any(other in names[0] for other in ",;\t"):
                    raise UserError(f"{place}: expected names parted by {delimiter!r}, found {names[0][:80]!r}")
            elif values:
                if len(values) != len(names):
                    raise UserError(f"{place}: expected {len(names)} fields, as in the header, found {len(values)}")
                row: dict[str, Any] = dict(zip(names, values, strict=True))
                yield place, row | {name: _number(row[name]) for name in numbers if name in row}
    except csv.Error as error:
        raise UserError(
            f"{file}, line {line}: not valid CSV ({error}); a field with quotes or line breaks stands in quotes, and a "
            "quote within it is written twice"
        ) from error
    except UnicodeDecodeError:
        with _opened(file) as again:
            for number, data in enumerate(again, 1):
                _decoded(file, data, number)
        raise


def _number(text: str) -> Any:
    return float(text) if NUMBER.fullmatch(text) else text if text.strip() else None


@contextmanager
def _opened(file: Path) -> Iterator[io.BufferedReader]:
    with pa.input_stream(str(file), compression=COMPRESSIONS.get(_endings(file)[-1])) as stream:
        yield io.BufferedReader(stream)


def _endings(file: Path) -> list[str]:
    """The last one or, of a compressed file, two endings of its name."""
    *_, before, last = ["", "", *Path(file.name.lower()).suffixes]
    return [before, last] if last in COMPRESSIONS else [last]


def _decoded(file: Path, data: bytes, line: int) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        *before, start = data[: error.start].split(b"\n")
        column = len(start.decode(errors="replace")) + 1
        raise UserError(
            f"{file}, line {line + len(before)}, column {column}: not UTF-8 (byte 0x{data[error.start]:02x})"
            "; save it as UTF-8 (such as iconv -f LATIN1 -t UTF-8)"
        ) from error


def _parsed(file: Path, text: str, place: str, first_line: int = 1, at: int | None = None) -> Any:
    """A JSON value: all of a text, or what stands in it at `at` and where that ends."""
    try:
        return DECODER.decode(text) if at is None else DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        hint = ""
        if "\0" in text:
            hint = "; it holds zero bytes: if it is UTF-16, save it as UTF-8"
        elif "\r" in text and at is None:
            hint = "; its lines end in carriage returns, where line feeds are expected"
        elif at is None and text.lstrip()[:1] == "[":
            hint = "; one object per line is expected, not an array over many"
        elif line == 1 and not error.msg.startswith("Invalid control"):
            hint = "; one object per line is expected, or all of them in an array"
        raise UserError(f"{file}, line {line}: not valid JSON ({error.msg} at column {error.colno}){hint}") from error
    except _NameTwice as error:
        raise UserError(f"{place}: {error}; leave one") from error
    except RecursionError as error:
        raise UserError(f"{place}: nested too deep to be read; leave out the column that is") from error
    except ValueError as error:  # the one that is left: an integer of thousands of digits
        most = sys.get_int_max_str_digits()
        marks = json.JSONDecoder(parse_int=lambda digits: ... if len(digits.lstrip("-")) > most else 0)
        row = marks.decode(text) if at is None else marks.raw_decode(text, at)[0]
        where, _ = find(row, lambda value: value is ...)
        raise UserError(
            f"{place}{where}: an integer of more than {most} digits; write it as text, or leave it out"
        ) from error


def _cannot_be_read(file: Path, error: Exception, after: str = "") -> NoReturn:
    reason = str(error).strip().split("\n")[0]
    raise UserError(f"{file}: cannot be read{after} ({reason}){_what_it_is(file) or '; copy it anew'}") from error


def _refuse_other(file: Path, head: bytes) -> None:
    """Refuse what is read from a file, unpacked if its name says that it is packed, if it is of no kind read so."""
    if what := _known(head):
        packed = _endings(file)[-1] in COMPRESSIONS
        raise UserError(f"{file}: {'unpack it, within ' if packed else ''}it is {what}")


def _known(head: bytes) -> str | None:
    return next((what for magic, what in MAGIC.items() if head.startswith(magic)), None)


def _what_it_is(file: Path) -> str:
    """What a file holds other than its name says, and what to do; nothing where they agree."""
    try:
        with file.open("rb") as stream:
            head = stream.read(max(map(len, MAGIC)))
    except OSError:
        return ""
    if found := _known(head):
        return "" if found.endswith(f" {_endings(file)[-1]}") else f"; it is {found}"
    if _endings(file)[-1] in COMPRESSIONS and head:
        return f"; it is not compressed: leave {_endings(file)[-1]} out of its name"
    if head and _endings(file)[-1] == ".parquet":
        return "; it is not Parquet: let its name end as what it is"
    return ""
