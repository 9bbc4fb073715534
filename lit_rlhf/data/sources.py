"""Rows of a source, one by one with their places, in our columns and checked."""

import itertools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from lit_rlhf.data.formats import EXPECTED, Kind, Row, check_row
from lit_rlhf.data.locating import find_files, load_named, require_no_split
from lit_rlhf.data.mapping import renamed, reshaped
from lit_rlhf.data.messages import without_null_fields
from lit_rlhf.data.naming import DEMO, Role, Source
from lit_rlhf.data.row_files import read_rows, rows_of
from lit_rlhf.errors import UserError

ROWS_AT_ONCE = 1024  # of a dataset
MOST_ROWS = 10**9  # that an epoch may take of a source
CONVERSATIONS = ("messages", "prompt", "completion", "chosen", "rejected", "tools", "chat_template_kwargs")
# A reward is called with prompts and responses; as a class, with itself.
RESERVED = ("prompts", "responses", "self")


def iterate_rows(source: Source, kind: Kind, role: Role) -> Iterator[Row]:
    """The rows of `placed_rows`, without their places."""
    return (row for _, row in placed_rows(source, kind, role))


def placed_rows(source: Source, kind: Kind, role: Role) -> Iterator[tuple[str, Row]]:
    """Place and row of each row of one source, checked; SFT and preference rows keep only the columns that matter.

    Raises:
        UserError: a row that cannot be read, or is not of its kind; names file, line and column.
    """
    for place, read in _iterate(source, kind, role):
        try:
            row = renamed(read, source.columns, kind, place)
            with _naming_theirs(source):
                checked = check_row(reshaped(row, kind, source.format, place), kind, place)
        except RecursionError as error:
            raise UserError(f"{place}: nested too deep to be read; leave out the column that is") from error
        if kind == "prompts" and role != "predict":
            _require_free_names(checked, place)
        if source.side is None or source.side.has(checked, place):
            yield place, checked


def no_rows(source: Source, kind: Kind) -> UserError:
    """What to say of a source without a row, or without one on its side of a split."""
    if source.side is not None:
        which, remedy = ("none", "raise") if source.side.held_out else ("all", "lower")
        return UserError(
            f"{source.name}: data.validation ({source.side.share:g}) holds out {which} of its rows, "
            f"of which those of one prompt stay together; {remedy} it, or name held-out rows"
        )
    return UserError(f"{source.name}: there are no rows; expected {EXPECTED[kind]}")


@contextmanager
def _naming_theirs(source: Source) -> Iterator[None]:
    """Say of an error what the file calls the columns that it names."""
    try:
        yield
    except UserError as error:
        theirs = [
            f"{ours!r} is the file's {named!r}"
            for ours, named in source.columns.items()
            if re.search(rf"['`]{re.escape(ours)}['`]", str(error))
        ]
        raise UserError(f"{error} ({', '.join(theirs)}, by `columns`)" if theirs else str(error)) from error


def place_of(source: Source, kind: Kind, role: Role, number: int) -> str:
    """Where row `number` of a source stands; reads it again up to there."""
    rows = _iterate if source.side is None else placed_rows
    return next(itertools.islice(rows(source, kind, role), number, None))[0]


def weighted(rows: np.ndarray, source: Source, seed: int) -> np.ndarray:
    """Rows as often as the weight of their source says: floor(weight) times each, and a random share besides.

    Raises:
        UserError: more rows than can be.
    """
    weight = source.weight
    if weight * len(rows) > MOST_ROWS:
        raise UserError(
            f"weight ({weight:g}) of {source.name} makes more than {MOST_ROWS:.0e} rows of its {len(rows)}; lower it"
        )
    whole, share = int(weight), weight - int(weight)
    extra = np.random.default_rng(seed).permutation(rows)[: max(round(share * len(rows)), int(whole == 0))]
    return np.concatenate([np.tile(rows, whole), np.sort(extra)])


def _require_free_names(row: Row, place: str) -> None:
    for name in RESERVED:
        if name in row:
            raise UserError(
                f"{place}, column {name!r}: a reward function has an argument of this name; rename the column, in the "
                f"file or by `columns: {{other_name: {name}}}`"
            )


def _iterate(source: Source, kind: Kind, role: Role) -> Iterator[tuple[str, Any]]:
    if source.name == DEMO:
        from lit_rlhf import demo  # its grammar is only needed here

        require_no_split(source)
        written: Any = {"scored": "sft", "scored_steps": "stepwise", "unpaired": "preference"}.get(kind, kind)
        rows = demo.rows(written, "train" if source.read_for(role) == "train" else "validation")
        yield from ((f"demo, row {number}", row) for number, row in enumerate(rows, 1))
        return
    files = find_files(source, role)
    if files is None:
        yield from _as_conversations(_rows_of_dataset(source.name, load_named(source, role)), source)
        return
    require_no_split(source)
    for file in files:
        placed = read_rows(file, numbers=[source.columns.get("margin", "margin")])
        yield from _as_conversations(placed, source) if file.suffix == ".parquet" else placed


def _as_conversations(rows: Iterator[tuple[str, Any]], source: Source) -> Iterator[tuple[str, Any]]:
    """Rows of Arrow, whose structures have every field that any of them has: null is what was not there."""
    theirs = [source.columns.get(name, name) for name in CONVERSATIONS]
    for place, row in rows:
        yield place, row | {name: without_null_fields(row[name]) for name in theirs if name in row}


def _rows_of_dataset(name: str, dataset: datasets.Dataset) -> Iterator[tuple[str, Any]]:
    done = 0
    try:
        for table in dataset.with_format("arrow").iter(batch_size=ROWS_AT_ONCE):  # as stored: no image is decoded
            yield from rows_of(table, lambda number, first=done + 1: f"{name}, row {first + number}")  # type: ignore[misc]
            done += len(table)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{name}: cannot be read after row {done} ({error}); save it anew") from error
