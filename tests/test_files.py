import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from lit_rlhf.files import replacing, write_json, write_lines


def failing(lines):
    yield from lines
    raise OSError(28, "No space left on device")


def test_what_could_not_be_written_whole_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "new" / "lines.jsonl"
    write_lines(["old"], file)
    with pytest.raises(OSError, match="No space left"):
        write_lines(failing(["half"]), file)
    assert file.read_text() == "old\n" and list(file.parent.iterdir()) == [file]
    write_json({"a": 1}, file)
    assert file.read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("shared", [True, False])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, shared):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file, shared) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_what_a_killed_process_left_is_written_over(tmp_path):
    (tmp_path / ".file.new").write_text("half of a file that was long")
    with replacing(tmp_path / "file") as aside, aside.open("w") as stream:
        stream.write("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "whole"


def test_writers_of_a_shared_file_do_not_meet(tmp_path):
    file, both = tmp_path / "file", threading.Barrier(2)

    def write(text):
        with replacing(file, shared=True) as aside:
            aside.write_text(text)
            both.wait(timeout=10)
            assert aside.read_text() == text

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ("a", "b")))
    assert file.read_text() in ("a", "b")
