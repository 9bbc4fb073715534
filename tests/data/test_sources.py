import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_rlhf.data.sources import Source, iterate_rows, parse_sources, weighted
from lit_rlhf.errors import UserError

SHARED = Path(__file__).parents[3] / "shared" / "data"
ROWS = [{"prompt": "é", "completion": " b"}, {"prompt": "c", "completion": " d"}]


def write(path, rows, compress=None):
    data = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)
    if compress == "zstd":
        with pa.output_stream(str(path), compression="zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(gzip.compress(data) if compress else data)
    return path


def read(source, role="train", kind="sft"):
    return list(iterate_rows(parse_sources(str(source))[0], kind, role))


def test_plain_gzip_zstd_and_parquet_files_give_the_same_rows(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl.gz", ROWS, "gzip")
    write(tmp_path / "c.json.zst", ROWS, "zstd")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert read(file) == ROWS
    assert read(tmp_path) == 4 * ROWS


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


def test_an_unknown_dataset_name_says_where_was_looked(monkeypatch):
    def fail(name, config):
        raise ConnectionError("no route\nlong story")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(
        UserError, match=r"nobody/nothing: neither a file .*/nobody/nothing\) .* \(ConnectionError: no route\)"
    ):
        read("nobody/nothing")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 2: not valid JSON .* at column 13"),
        (b'["text"]', r"line 2: expected an object"),
        (b'{"text": 5}', r"line 2, column 'text': expected text, found int \(5\)"),
        (b'{"text": "\xff"}', r"line 2: not UTF-8"),
        (b"[", r"line 2: not valid JSON .* one object per line is expected"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=f"{file}, {message}"):
        read(file)


def test_a_bad_parquet_row_and_a_file_that_is_none_are_named(tmp_path):
    pq.write_table(pa.Table.from_pylist([{"text": "a"}, {"text": None}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 2: expected the columns"):
        read(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"b\.parquet: not a Parquet file"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"c.jsonl.gz: cannot be read after line"):
        read(tmp_path / "c.jsonl.gz")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "a/b/c"])
def test_a_missing_file_is_named_in_full(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"{(tmp_path / name).absolute()}: no such file or folder; expected JSON Lines"):
        read(name)


def test_unknown_endings_and_empty_folders_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match="unknown ending"):
        read(tmp_path / "a.csv")
    with pytest.raises(UserError, match="no data files in this folder"):
        read(tmp_path)


def test_sources_are_named_in_four_forms():
    assert parse_sources("demo") == [Source("demo")]
    assert parse_sources(["a", "b"]) == [Source("a"), Source("b")]
    assert parse_sources({"a": 2.0}) == [Source("a", 2.0)]
    assert parse_sources([{"source": "a", "weight": 0.5, "split": "s"}]) == [Source("a", 0.5, "s")]
    with pytest.raises(UserError, match="keys source, weight, split and config; found \\['sauce'\\]"):
        parse_sources([{"sauce": "a"}])
    with pytest.raises(UserError, match=r"weight \(0\.0\) must be above 0"):
        parse_sources({"a": 0})
    with pytest.raises(UserError, match="empty"):
        parse_sources([])


def test_a_weight_says_how_often_rows_are_taken():
    rows = np.arange(10)
    assert np.bincount(weighted(rows, 2.0, seed=0)).tolist() == [2] * 10
    half = weighted(rows, 0.5, seed=0)
    assert len(set(half.tolist())) == 5 and half.tolist() == weighted(rows, 0.5, seed=0).tolist()
    assert sorted(np.bincount(weighted(rows, 1.3, seed=0)).tolist()) == [1] * 7 + [2] * 3
    assert len(weighted(rows, 0.01, seed=0)) == 1


def test_the_demo_is_a_source_of_every_kind():
    for kind in ("sft", "preference", "prompts"):
        rows = read("demo", "validation", kind)
        assert len(rows) > 100 and "prompt" in rows[0]


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data folder with real rows")
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("sft/sft_test.jsonl.gz", "sft"),
        ("stories/stories_test.jsonl.gz", "sft"),
        ("math/gsm8k_test.jsonl.gz", "sft"),
        ("math/gsm8k_test.jsonl.gz", "prompts"),
        ("preference/hh_helpful_test.jsonl.gz", "preference"),
        ("preference/pandalm_human_test.jsonl.gz", "preference"),
        ("stories/stories_preference_test.jsonl.gz", "preference"),
    ],
)
def test_real_files_are_read_whole(file, kind):
    with gzip.open(SHARED / file) as stream:
        assert len(read(SHARED / file, kind=kind)) == sum(1 for _ in stream)
