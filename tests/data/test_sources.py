import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lit_rlhf.data.naming import Source, parse_sources
from lit_rlhf.data.sources import iterate_rows, place_of, weighted
from lit_rlhf.errors import UserError
from tests.data.small_rows import read

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


def test_plain_gzip_zstd_and_parquet_files_give_the_same_rows(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    write(tmp_path / "b.jsonl.gz", ROWS, "gzip")
    write(tmp_path / "c.json.zst", ROWS, "zstd")
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "d.parquet")
    for file in sorted(tmp_path.iterdir()):
        assert read(file) == ROWS
    assert read(tmp_path) == 4 * ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', r"line 2: not valid JSON .* at column 13"),
        (b'["text"]', r"line 2: expected an object"),
        (b'{"text": 5}', r"line 2, column 'text': expected text, found int \(5\)"),
        (b'{"text": "\xff"}', r"line 2, column 11: not UTF-8 \(byte 0xff\)"),
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
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read \(Parquet magic bytes not found"):
        read(tmp_path / "b.parquet")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 99_999)[:-9])
    with pytest.raises(UserError, match=r"c.jsonl.gz: cannot be read after line \d+ \(Truncated compressed stream\)"):
        read(tmp_path / "c.jsonl.gz")


def test_a_weight_that_takes_more_rows_than_memory_holds_is_refused():
    with pytest.raises(UserError, match=r"weight \(1e\+300\) of a makes more than 1e\+09 rows of its 10"):
        weighted(np.arange(10), Source("a", 1e300), seed=0)


def test_rows_are_read_by_their_declared_columns_and_shape(tmp_path):
    (tmp_path / "a.csv").write_text("question,answer\nq, a\n")
    (tmp_path / "b.json").write_text(json.dumps([{"instruction": "q", "output": "a"}]))
    given = [
        {"source": str(tmp_path / "a.csv"), "columns": {"prompt": "question", "completion": "answer"}},
        {"source": str(tmp_path / "b.json"), "format": "alpaca"},
    ]
    rows = [row for source in parse_sources(given) for row in iterate_rows(source, "sft", "train")]
    chat = {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}
    assert rows == [{"prompt": "q", "completion": " a"}, chat]


def test_margins_of_csv_are_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,gap\nq,y,n,0.5\nq,y,n,\n")
    [source] = parse_sources(str(tmp_path / "a.csv"), columns={"margin": "gap"})
    assert [row["margin"] for row in iterate_rows(source, "preference", "train")] == [0.5, 0.0]


@pytest.mark.parametrize("name", ["prompts", "responses", "self"])
def test_a_column_that_a_reward_has_as_an_argument_is_named_where_it_stands_or_renamed(tmp_path, name):
    file = write(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b", name: 1}])
    with pytest.raises(
        UserError, match=rf"p\.jsonl, line 2, column '{name}': a reward function has an argument of this"
    ):
        read(file, kind="prompts")
    assert read(file, "predict", "prompts")[1] == {"prompt": "b", name: 1}, "no reward is asked"
    write(file, [{"prompt": "b", name: 1}])
    [source] = parse_sources(str(file), columns={"other": name})
    assert list(iterate_rows(source, "prompts", "train")) == [{"prompt": "b", "other": 1}]


def test_rows_nested_too_deep_are_named_wherever_that_shows(tmp_path):
    deep = 900 * "["  # the parser takes it, a comparison of two conversations may not
    turn = '{"role": "user", "content": "q", "x": ' + deep + "]" * 900 + "}"
    file = tmp_path / "deep.jsonl"
    file.write_text('{"chosen": [%s, %s], "rejected": [%s, %s]}\n' % ((turn,) * 4))
    with pytest.raises(UserError, match=r"deep\.jsonl, line 1"):
        read(file, kind="preference")


def test_a_row_can_be_placed_by_its_number(tmp_path):
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('\n{"text": "t"}\n')
    [source] = parse_sources(str(tmp_path))
    assert place_of(source, "sft", "train", 2) == f"{tmp_path / 'b.jsonl'}, line 2"


def test_a_weight_says_how_often_rows_are_taken():
    rows = np.arange(10)
    assert np.bincount(weighted(rows, Source("a", 2.0), seed=0)).tolist() == [2] * 10
    half = weighted(rows, Source("a", 0.5), seed=0)
    assert len(set(half.tolist())) == 5 and half.tolist() == weighted(rows, Source("a", 0.5), seed=0).tolist()
    assert sorted(np.bincount(weighted(rows, Source("a", 1.3), seed=0)).tolist()) == [1] * 7 + [2] * 3
    assert len(weighted(rows, Source("a", 0.01), seed=0)) == 1


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


def test_conversations_from_arrow_have_no_fields_that_they_did_not_have(tmp_path):
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    tools = [{"name": "f", "parameters": {"x": {"type": "int"}}}, {"name": "g", "parameters": {"y": {"type": "str"}}}]
    result = {"role": "tool", "name": "f", "content": "r"}
    rows = [{"messages": [ask, call, result, answer], "tools": tools}, {"messages": [ask, answer], "tools": None}]
    wanted = [rows[0], {"messages": [ask, answer]}]
    write(tmp_path / "rows.jsonl", rows)
    table = pa.Table.from_pylist(rows)
    assert table.column("messages")[1].as_py()[0]["tool_calls"] is None, "which is how Arrow holds them"
    pq.write_table(table, tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for name in ("rows.jsonl", "rows.parquet", "saved"):
        assert read(tmp_path / name) == wanted, name


def test_null_fields_that_json_lines_spell_out_stay_inside_tools_and_so_do_those_of_rewards(tmp_path):
    tools = [{"name": "f", "parameters": {"x": {"default": None}}}]
    ask = {"role": "user", "content": "q"}
    row = {"prompt": [ask], "tools": tools, "facts": {"known": None, "year": 3}}
    write(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl", kind="prompts") == [row]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rows.parquet")
    [held] = read(tmp_path / "rows.parquet", kind="prompts")
    assert held["facts"] == row["facts"] and held["tools"] == [{"name": "f", "parameters": {"x": {}}}]


def test_pairs_as_ultrafeedback_has_them_are_read_whatever_is_null(tmp_path):
    ask, good, bad = (
        {"content": text, "role": role, "name": None, "tool_calls": None}
        for text, role in (("q", "user"), ("yes", "assistant"), ("no", "assistant"))
    )
    row = {"prompt": "q", "prompt_id": "x", "messages": [ask, good], "margin": None}
    row |= {"chosen": [ask, good], "rejected": [ask, bad], "score_chosen": 8.0, "score_rejected": None}
    wanted = {"prompt": "q", "chosen": "yes", "rejected": "no"}
    message = {name: {"content": text, "role": "assistant"} for name, text in wanted.items()}
    pair = {"prompt": [{"content": "q", "role": "user"}], "chosen": [message["chosen"]], "margin": 0.0}
    pair["rejected"] = [message["rejected"]]
    write(tmp_path / "rows.jsonl", [row])
    pq.write_table(pa.Table.from_pylist([row, row | {"score_rejected": 1.0}]), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.jsonl", kind="preference") == [pair]
    assert read(tmp_path / "rows.parquet", kind="preference") == [pair] * 2
    assert read(tmp_path / "rows.parquet", kind="sft") == [{"messages": [*pair["prompt"], *pair["chosen"]]}] * 2


def test_what_is_wrong_with_a_renamed_column_is_said_by_the_files_name_too(tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question": "q", "answer": 5}, {"question": "q", "answer": None}])
    [source] = parse_sources(str(file), columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(UserError, match=r"line 1, column 'completion': .* \('completion' is the file's 'answer', by"):
        next(iterate_rows(source, "sft", "train"))
