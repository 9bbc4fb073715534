import errno
import os
import re
from contextlib import nullcontext
from pathlib import Path

import datasets
import pytest

from lit_rlhf.data import locating
from lit_rlhf.data.locating import fingerprint
from lit_rlhf.data.naming import parse_sources
from lit_rlhf.data.sources import iterate_rows
from lit_rlhf.errors import UserError
from lit_rlhf.models import hub
from tests.data.small_rows import read, write

ROWS = [{"prompt": "é", "completion": " b"}, {"prompt": "c", "completion": " d"}]


def test_a_folder_is_read_by_the_split_words_in_its_file_names(tmp_path):
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "x_train.jsonl", ROWS[:1])
    write(tmp_path / "data" / "test-00000.jsonl", ROWS[1:])
    assert read(tmp_path, "train") == ROWS[:1]
    assert read(tmp_path, "validation") == read(tmp_path, "test") == ROWS[1:]
    (tmp_path / "data" / "x_train.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file for train by its name; found test-00000\.jsonl"):
        read(tmp_path, "train")


def test_a_saved_dataset_is_read_by_its_splits(tmp_path):
    one = datasets.Dataset.from_list(ROWS)
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one.select([0]), "dev": one.select([1])}).save_to_disk(tmp_path / "both")
    assert read(tmp_path / "one") == ROWS
    assert read(tmp_path / "both", "train") == ROWS[:1]
    assert read(tmp_path / "both", "validation") == ROWS[1:]
    [source] = parse_sources([{"source": str(tmp_path / "both"), "split": "dev"}])
    assert list(iterate_rows(source, "sft", "train")) == ROWS[1:]
    datasets.DatasetDict({"odd": one}).save_to_disk(tmp_path / "odd")
    with pytest.raises(UserError, match=r"no split for train among \['odd'\]"):
        read(tmp_path / "odd")


def test_a_dataset_name_goes_to_the_datasets_library(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "test"])
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    [source] = parse_sources([{"source": "someone/pairs", "config": "en"}])
    assert list(iterate_rows(source, "sft", "validation")) == ROWS
    assert asked == [("someone/pairs", "en", "test")]


def test_a_dataset_that_the_hub_does_not_have_is_told_with_the_folder_that_is_not_there_either(monkeypatch):
    def fail(name, config):
        raise FileNotFoundError("no such dataset\nlong story")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    monkeypatch.setattr(locating, "hub_or_cache", lambda name: nullcontext(""))
    where = r"nobody/nothing: no file or folder \(/.*/nobody/nothing\), nor a dataset"
    with pytest.raises(UserError, match=rf"{where} \(FileNotFoundError: no such dataset\)$"):
        read("nobody/nothing")


@pytest.mark.parametrize("name", ["gone", "nobody/gone"])
def test_a_misspelt_folder_is_answered_without_retries(monkeypatch, name):
    monkeypatch.setattr(hub, "answers", lambda endpoint: False)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s"))
    with pytest.raises(
        UserError, match=f"{name}: there is no file or folder /.*/{name}, no dataset of this name is in"
    ):
        read(name)


@pytest.mark.parametrize("name", ["my data", '{"prompt": "a"}', "json", "gone.csv", "./gone", "~/gone"])
def test_what_can_be_no_dataset_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(locating, "hub_or_cache", lambda name: pytest.fail("asks the hub"))
    with pytest.raises(UserError, match=f"{re.escape(name.lstrip('.~'))}: no such file or folder; expected JSON Lines"):
        read(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("https://example.com/rows.jsonl", "https://example.com/rows.jsonl: an address; download the file"),
        ("x" * 5000, "'x{80}' cannot be the name of a file, a folder or a dataset \\(File name too long\\)"),
        ("a\0b", "cannot be the name of a file, a folder or a dataset"),
        ("~no-such-user/rows", "'~no-such-user/rows' cannot be the name"),
    ],
)
def test_what_can_be_no_name_is_said_to_be_none(name, message):
    with pytest.raises(UserError, match=message):
        read(name)


def test_pipes_devices_and_broken_links_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "link.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl: a pipe or a device, where a file is expected"):
        read(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match="/dev/null: a pipe or a device"):
        read("/dev/null")
    with pytest.raises(UserError, match=r"link\.jsonl: a link to gone\.jsonl, which is not there"):
        read(tmp_path / "link.jsonl")


def test_what_tools_keep_beside_the_data_of_a_folder_is_left_alone(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("prompt,completion\nq, a\n")
    (tmp_path / "._a.jsonl").write_bytes(b"\0\1")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "x.json").write_text("zz")
    (tmp_path / "README.md").write_text("# rows")
    assert read(tmp_path) == [*ROWS, {"prompt": "q", "completion": " a"}]


def test_a_saved_dataset_that_is_damaged_or_has_no_splits_is_named(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"one: split \(test\) and config \(None\) choose among"):
        list(iterate_rows(parse_sources([{"source": str(tmp_path / "one"), "split": "test"}])[0], "sft", "train"))
    (file,) = (tmp_path / "one").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"one: a saved dataset that cannot be loaded \(ArrowInvalid: "):
        read(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"one: a saved dataset that cannot be loaded \(KeyError: "):
        read(tmp_path / "one")


def test_a_row_of_a_saved_dataset_is_named_by_its_number(tmp_path):
    datasets.Dataset.from_list([*ROWS, {"prompt": "q", "completion": None}]).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="one, row 3: expected the columns"):
        read(tmp_path / "one")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "a/b/c"])
def test_a_missing_file_is_named_in_full(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{(tmp_path / name).absolute()}: no such file or folder; expected JSON Lines"):
        read(name)


def test_unknown_endings_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "a.xlsx").write_text("x")
    with pytest.raises(UserError, match="unknown ending"):
        read(tmp_path / "a.xlsx")
    with pytest.raises(UserError, match="no data files in this folder"):
        read(tmp_path)


def test_the_fingerprint_is_of_the_content_whatever_its_name_and_time(tmp_path):
    def of(name, role="train", **fields):
        return fingerprint(parse_sources([{"source": str(tmp_path / name), **fields}])[0], role)

    file = tmp_path / "a.jsonl"
    write(file, ROWS)
    os.utime(file, (1e9, 1e9))
    first = of("a.jsonl")
    file.write_bytes(file.read_bytes().replace(b"c", b"C"))
    os.utime(file, (1e9, 1e9))
    assert of("a.jsonl") != first
    write(tmp_path / "b.jsonl", ROWS)
    assert of("b.jsonl") == first
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "saved")
    assert of("saved", "train") != of("saved", "test")
    whole = of("saved")
    (arrow,) = (tmp_path / "saved" / "train").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b" b", b" B"))
    assert of("saved") != whole


def test_linked_folders_are_read_once_however_they_are_linked(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere" / "a.jsonl", ROWS)
    data = tmp_path / "data"
    data.mkdir()
    (data / "part").symlink_to(tmp_path / "elsewhere")
    (data / "same").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    assert read(data) == ROWS


def test_links_of_a_folder_that_lead_nowhere_are_named_where_their_rows_are_asked_for(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "test.jsonl").symlink_to("gone.jsonl")
    assert read(tmp_path, "train") == ROWS
    with pytest.raises(UserError, match=r"test\.jsonl: a link to gone\.jsonl, which is not there"):
        read(tmp_path, "test")


def test_a_folder_that_may_not_be_read_is_named_and_not_passed_over(tmp_path, monkeypatch):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b").mkdir()

    def iterdir(folder, known=Path.iterdir):  # whoever runs the tests may be allowed everything
        if folder.name == "b":
            raise PermissionError(errno.EACCES, "Permission denied")
        return known(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UserError, match=r"/b: a folder that cannot be read \(Permission denied\)"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("data/*.jsonl", r"a pattern is not read: name the folder, .*, or list them: \[a\.jsonl, b\.jsonl\]"),
        ("a.jsonl, b.csv.gz", r"several files are a list: \[a\.jsonl, b\.csv\.gz\]"),
        ("rows.jsonl[:100]", r"a part of its rows is taken by a weight below 1, as in \{rows\.jsonl: 0\.5\}"),
        ("rows.jsonl[50%:]", r"as in \{rows\.jsonl: 0\.5\}"),
        ("0.1", "a number, where a file is expected: no share of other rows is held out"),
    ],
)
def test_a_name_that_other_tools_read_as_more_than_one_file_is_told_with_what_to_write(monkeypatch, name, meant):
    [source] = parse_sources(name)
    monkeypatch.setattr(locating, "hub_or_cache", lambda name: pytest.fail("asks the hub"))
    with pytest.raises(UserError, match=f"{re.escape(name)}: .*{meant}"):
        locating.find_files(source, "train")
