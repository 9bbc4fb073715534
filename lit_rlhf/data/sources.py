"""Sources of rows: files, folders, names for the `datasets` library, and the embedded demo."""

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_rlhf.data.formats import Kind, Row, Sources, check_row
from lit_rlhf.errors import UserError, looks_like_a_path

Role = Literal["train", "validation", "test", "predict"]  # what the rows are for
# What each stage of the Trainer needs.
STAGES: dict[str, tuple[Role, ...]] = {
    "fit": ("train", "validation"),
    "validate": ("validation",),
    "test": ("test",),
    "predict": ("predict",),
}

DEMO = "demo"
LINES = (".jsonl", ".json", ".ndjson")
COMPRESSED = ("", ".gz", ".zst", ".bz2")
ENDINGS = (*(lines + packed for lines in LINES for packed in COMPRESSED), ".parquet")
# Words in file names and splits that say what rows are for, the best one first.
SPLIT_WORDS: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
    "test": ("test", "validation", "valid", "val", "dev", "eval"),
    "predict": ("predict", "test", "validation", "valid", "val", "dev", "eval"),
}


class Source(NamedTuple):
    """One origin of rows and how much of it an epoch takes."""

    name: str
    weight: float = 1.0  # passes over its rows in an epoch; 0.5 is a random half, the same in every epoch
    split: str | None = None  # of a `datasets` name; chosen by what the rows are for if None
    config: str | None = None  # of a `datasets` name


def parse_sources(sources: Sources) -> list[Source]:
    """Read the forms in which a user may name sources.

    Args:
        sources: a name; a list of names; a list of `{"source": name, "weight": 1.0, "split": ..., "config": ...}`; or
            a mapping from name to weight.

    Raises:
        UserError: another form, an unknown key, or a weight that is not positive.
    """
    entries: list[Any] = (
        [{"source": name, "weight": weight} for name, weight in sources.items()]
        if isinstance(sources, dict)
        else sources
        if isinstance(sources, list)
        else [sources]
    )
    parsed = []
    for entry in entries:
        fields = dict(entry) if isinstance(entry, dict) else {"source": os.fspath(entry)}
        unknown = set(fields) - {"source", "weight", "split", "config"}
        if unknown or "source" not in fields:
            raise UserError(f"a data source has the keys source, weight, split and config; found {sorted(fields)}")
        try:
            weight = float(fields.get("weight", 1.0))
        except (TypeError, ValueError):
            raise UserError(f"{fields['source']}: weight ({fields['weight']!r}) must be a number") from None
        source = Source(os.fspath(fields["source"]), weight, fields.get("split"), fields.get("config"))
        if source.weight <= 0:
            raise UserError(f"{source.name}: weight ({source.weight}) must be above 0; leave the source out instead")
        parsed.append(source)
    if not parsed:
        raise UserError("the list of data sources is empty; name a file, a folder, a `datasets` name, or 'demo'")
    return parsed


def iterate_rows(source: Source, kind: Kind, role: Role) -> Iterator[Row]:
    """Checked rows of one source; of SFT and preference rows only the columns that matter are kept."""
    for place, row in _iterate(source, kind, role):
        yield check_row(row, kind, place)


def fingerprint(source: Source, role: Role) -> list[Any]:
    """What a cache key must hold so that changed data are never mistaken for cached ones."""
    if (files := find_files(source, role)) is not None:
        return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return [_load_named(source, role)._fingerprint]


def find_files(source: Source, role: Role) -> list[Path] | None:
    """The files that a source stands for, or None where it is a saved dataset or a name for the `datasets` library.

    Raises:
        UserError: a missing file, an unknown ending, or a folder without files for this role.
    """
    path = Path(source.name).expanduser().absolute()
    if path.is_dir() and not _is_saved_dataset(path):
        return _files_of_folder(path, role)
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(
                f"{path}: unknown ending; data files end in {', '.join(LINES)} (or .gz, .zst, .bz2) or .parquet"
            )
        return [path]
    if not path.exists() and (source.name.endswith(ENDINGS) or looks_like_a_path(source.name)):
        raise UserError(f"{path}: no such file or folder; expected JSON Lines (plain, .gz, .zst, .bz2) or Parquet")
    return None


def weighted(rows: np.ndarray, weight: float, seed: int) -> np.ndarray:
    """Rows as often as `weight` says: each floor(weight) times, and a random share for the rest of it."""
    whole, share = int(weight), weight - int(weight)
    extra = np.random.default_rng(seed).permutation(rows)[: max(round(share * len(rows)), int(whole == 0))]
    return np.concatenate([np.tile(rows, whole), np.sort(extra)])


def _iterate(source: Source, kind: Kind, role: Role) -> Iterator[tuple[str, Any]]:
    if source.name == DEMO:
        from lit_rlhf import demo  # its grammar is only needed here

        _require_no_split(source)
        rows = demo.rows("sft" if kind == "scored" else kind, "train" if role == "train" else "validation")
        yield from ((f"demo, row {number}", row) for number, row in enumerate(rows, 1))
        return
    files = find_files(source, role)
    if files is None:
        named = _load_named(source, role)
        yield from ((f"{source.name}, row {number}", row) for number, row in enumerate(named, 1))
        return
    _require_no_split(source)
    for file in files:
        yield from _iterate_parquet(file) if file.suffix == ".parquet" else _iterate_lines(file)


def _iterate_lines(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pa.input_stream(str(file), compression="detect") as stream:
            for number, line in enumerate(io.BufferedReader(stream), 1):
                if line.strip():
                    yield f"{file}, line {number}", json.loads(line.decode("utf-8-sig").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        hint = "; one object per line is expected, not an array over many" if error.doc.lstrip()[:1] == "[" else ""
        raise UserError(f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno}){hint}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, line {number}: not UTF-8 (byte {error.start}: {error.reason})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read after line {number} ({error})") from error


def _iterate_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", row
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a Parquet file that can be read ({error})") from error


def _files_of_folder(folder: Path, role: Role) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name.endswith(ENDINGS))
    if not files:
        raise UserError(f"{folder}: no data files in this folder; expected {', '.join(LINES)} or .parquet")
    words = {file: set(re.findall(r"[a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    all_words = {word for role_words in SPLIT_WORDS.values() for word in role_words}
    if not any(words[file] & all_words for file in files):
        return files
    for wanted in SPLIT_WORDS[role]:
        if matching := [file for file in files if wanted in words[file]]:
            return matching
    raise UserError(f"{folder}: no file for {role} by its name; found {', '.join(file.name for file in files[:8])}")


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def _load_named(source: Source, role: Role) -> datasets.Dataset:
    """A dataset saved to disk, or one that the `datasets` library finds by its name."""
    path = Path(source.name).expanduser().absolute()
    try:
        if path.is_dir():
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.Dataset):
                return loaded
            if source.split is not None and source.split not in loaded:
                raise UserError(f"{source.name}: there is no split {source.split!r}; it has {sorted(loaded)}")
            return loaded[source.split or _choose_split(source.name, list(loaded), role)]
        splits = datasets.get_dataset_split_names(source.name, source.config) if source.split is None else []
        split = source.split or _choose_split(source.name, splits, role)
        return datasets.load_dataset(source.name, source.config, split=split)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{source.name}: neither a file or folder ({path}) nor a dataset that the `datasets` library could load "
            f"({type(error).__name__}: {reason})"
        ) from error


def _require_no_split(source: Source) -> None:
    if source.split is not None or source.config is not None:
        raise UserError(
            f"{source.name}: split ({source.split}) and config ({source.config}) choose among those of a dataset; "
            "files have none: name the file that holds the rows"
        )


def _choose_split(name: str, splits: list[str], role: Role) -> str:
    for word in SPLIT_WORDS[role]:
        if word in splits:
            return word
    raise UserError(f"{name}: no split for {role} among {splits}; say which as {{source: {name}, split: ...}}")
