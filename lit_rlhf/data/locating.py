"""Where the rows of a source are: files, folders, datasets saved to disk or known by name to the `datasets` library."""

import functools
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import xxhash
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES  # "json" would read whatever the current folder holds

from lit_rlhf.data.naming import DEMO, Role, Source
from lit_rlhf.data.row_files import ENDINGS, EXPECTED_FILES
from lit_rlhf.errors import UserError, looks_like_a_path
from lit_rlhf.models.hub import HUB_NAME, hub_or_cache

# Words in file names and splits that say what rows are for, the best one first.
SPLIT_WORDS: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval", "test"),
    "test": ("test", "validation", "valid", "val", "dev", "eval"),
    "predict": ("predict", "test", "validation", "valid", "val", "dev", "eval"),
}

SLICE = re.compile(r"\[-?\d*%?:-?\d*%?\]$")  # of rows, as the `datasets` library has it for splits
NUMBER = re.compile(r"\d*\.?\d+%?")


def fingerprint(source: Source, role: Role) -> str:
    """Hash of what a source holds, whatever its files are called and whenever they were written.

    Sizes and times are not asked: a file that was mended in place, or put back by rsync or tar, may have the same.
    """
    path = Path(source.name).expanduser().absolute()
    files: list[Path] | None
    if source.name == DEMO:
        files = sorted((Path(__file__).parents[1] / "demo").glob("*.py"))  # its rows are written by its grammar
    elif (files := find_files(source, role)) is None and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    if files is None:
        return str(load_named(source, role)._fingerprint)
    digest = xxhash.xxh3_128()
    if source.name == DEMO or path.is_dir():
        digest.update(f"{source.read_for(role)} {source.split} ".encode())  # of one content, other rows
    for file in files:
        digest.update(f"{file.suffixes} {file.stat().st_size} ".encode())
        try:
            with file.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error})") from error
    return digest.hexdigest()


def input_files(sources: Iterable[Source], role: Role) -> list[Path]:
    """The files of a user's that rows of these sources come from."""
    return [file for source in sources if source.name != DEMO for file in find_files(source, role) or ()]


def files_there(sources: Iterable[Source], role: Role) -> list[Path]:
    """As `input_files`, of sources that need not be there."""
    files = []
    for source in sources:
        with suppress(UserError):
            files += input_files([source], role)
    return files


def find_files(source: Source, role: Role) -> list[Path] | None:
    """The files that a source stands for, or None where it is a saved dataset or a name for the `datasets` library.

    Raises:
        UserError: a missing file, an unknown ending, what is no file at all, or a folder without files for this role.
    """
    if "://" in source.name:
        raise UserError(f"{source.name}: an address; download the file, or name a dataset of the hub as owner/name")
    try:
        path = Path(source.name).expanduser().absolute()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError, RuntimeError) as error:  # a name that is too long, holds a zero byte, or ~nobody
        why = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{source.name[:80]!r} cannot be the name of a file, a folder or a dataset ({why})") from error
    if mode is None:
        _require_target(path)
        of_a_hub = HUB_NAME.fullmatch(source.name) and source.name not in _PACKAGED_DATASETS_MODULES
        if source.name.lower().endswith(ENDINGS) or looks_like_a_path(source.name) or not of_a_hub:
            meant = _meant(source.name) or f"expected {EXPECTED_FILES}, or a folder of them"
            raise UserError(f"{path}: no such file or folder; {meant}")
        if NUMBER.fullmatch(source.name):
            raise UserError(f"{source.name}: a number, where a file is expected: no share of other rows is held out")
        return None
    if stat.S_ISDIR(mode):
        return None if _is_saved_dataset(path) else _files_of_folder(path, source.read_for(role))
    if not stat.S_ISREG(mode):
        raise UserError(
            f"{path}: a pipe or a device, where a file is expected: rows are read more than once; save them"
        )
    if not path.name.lower().endswith(ENDINGS):
        raise UserError(f"{path}: unknown ending; a data file is {EXPECTED_FILES}")
    return [path]


def _meant(name: str) -> str | None:
    """What is to be written in place of a name that other tools would read as more than one."""
    parts = [part.strip() for part in name.split(",")]
    if len(parts) > 1 and all(part.lower().endswith(ENDINGS) for part in parts):
        return f"several files are a list: [{', '.join(parts)}]"
    if SLICE.search(name):
        whole = SLICE.sub("", name)
        return f"a file is read whole; a part of its rows is taken by a weight below 1, as in {{{whole}: 0.5}}"
    if set(name) & set("*?"):
        return "a pattern is not read: name the folder, whose files are read, or list them: [a.jsonl, b.jsonl]"
    return None


def _files_of_folder(folder: Path, role: Role) -> list[Path]:
    files = list(_files_below(folder, set()))
    if not files:
        raise UserError(f"{folder}: no data files in this folder; expected {EXPECTED_FILES}")
    chosen = _of_role(folder, files, role)
    for file in chosen:
        _require_target(file)
    return chosen


def _of_role(folder: Path, files: list[Path], role: Role) -> list[Path]:
    words = {file: set(re.findall(r"[a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    all_words = {word for role_words in SPLIT_WORDS.values() for word in role_words}
    if not any(words[file] & all_words for file in files):
        return files
    for wanted in SPLIT_WORDS[role]:
        if matching := [file for file in files if wanted in words[file]]:
            return matching
    raise UserError(f"{folder}: no file for {role} by its name; found {', '.join(file.name for file in files[:8])}")


def _files_below(folder: Path, seen: set[Path]) -> Iterator[Path]:
    """Files of rows in a folder and those below it, linked ones too, each folder once; links that lead nowhere too.

    Hidden ones are what editors, browsers and download tools keep beside the data.

    Raises:
        UserError: a folder that may not be read: its rows would be missing.
    """
    seen.add(folder.resolve())
    try:
        entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: a folder that cannot be read ({error.strerror})") from error
    for path in entries:
        if path.is_dir():
            if path.resolve() not in seen:
                yield from _files_below(path, seen)
        elif path.name.lower().endswith(ENDINGS) and (path.is_file() or path.is_symlink()):
            yield path


def _require_target(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise UserError(f"{path}: a link to {os.readlink(path)}, which is not there")


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").exists() or (path / "dataset_dict.json").exists()


def load_named(source: Source, role: Role) -> datasets.Dataset:
    """A dataset saved to disk, or one that the `datasets` library finds by its name."""
    path = Path(source.name).expanduser().absolute()
    try:
        if not path.is_dir():
            return _load_from_hub(source.name, source.config, source.split, source.read_for(role))
        loaded = datasets.load_from_disk(str(path))
        if isinstance(loaded, datasets.Dataset):
            require_no_split(source)
            return loaded
        if source.split is not None and source.split not in loaded:
            raise UserError(f"{source.name}: there is no split {source.split!r}; it has {sorted(loaded)}")
        return loaded[source.split or _choose_split(source.name, list(loaded), source.read_for(role))]
    except UserError:
        raise
    except Exception as error:  # of a damaged folder, or of whatever the hub answers: each has errors of its own
        what = (
            "a saved dataset that cannot be loaded" if path.is_dir() else f"no file or folder ({path}), nor a dataset"
        )
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UserError(f"{source.name}: {what} ({type(error).__name__}: {reason})") from error


@functools.lru_cache(maxsize=8)  # asked for by its content's hash, its first row and its rows
def _load_from_hub(name: str, config: str | None, split: str | None, role: Role) -> datasets.Dataset:
    with hub_or_cache(name) as unreachable:
        try:
            splits = datasets.get_dataset_split_names(name, config) if split is None else []
            return datasets.load_dataset(name, config, split=split or _choose_split(name, splits, role))
        except Exception as error:
            if not unreachable or isinstance(error, UserError):
                raise
            raise UserError(
                f"{name}: there is no file or folder {Path(name).absolute()}, no dataset of this name is in the cache, "
                f"and {unreachable}"
            ) from error


def require_no_split(source: Source) -> None:
    """Refuse to choose among the splits of what has none."""
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
