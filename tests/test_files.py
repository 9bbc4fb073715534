"""What stands under a name is whole, whatever became of the process that wrote it."""

import errno
import fcntl
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from lit_rlhf import UserError, files
from lit_rlhf.files import NEW, OLD, SECONDS_TO_DOUBT, heal, make_folder, make_room, replacing, write_json, write_lines


def failing(lines):
    yield from lines
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_folder(target, **files):
    """As an export is written."""
    with replacing(target) as aside:
        aside.mkdir()
        for name, text in files.items():
            (aside / name).write_text(text)


def test_what_could_not_be_written_whole_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "new" / "lines.jsonl"
    write_lines(["old"], file)
    with pytest.raises(OSError, match="No space left"):
        write_lines(failing(["half"]), file)
    assert file.read_text() == "old\n" and list(file.parent.iterdir()) == [file]
    write_json({"a": 1}, file)
    assert file.read_text() == '{\n  "a": 1\n}\n'


def test_a_disk_that_fills_up_is_told_with_the_name_of_what_was_written(tmp_path):
    with pytest.raises(OSError) as told:
        write_lines(failing(["half"]), tmp_path / "lines.jsonl")
    assert told.value.filename == str(tmp_path / "lines.jsonl")
    with pytest.raises(OSError) as told, replacing(tmp_path / "model") as aside:
        (aside / "missing" / "config.json").write_text("{}")
    assert told.value.filename == str(tmp_path / "model")


@pytest.mark.parametrize("shared", [True, False])
def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path, shared):
    file = tmp_path / "file"
    file.write_text("old")
    with replacing(file, shared) as aside:
        aside.write_text("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new"


def test_a_folder_takes_the_place_of_another_whole(tmp_path):
    write_folder(tmp_path / "model", config="old", weights="old")
    write_folder(tmp_path / "model", config="new")
    assert names(tmp_path) == ["model"] and names(tmp_path / "model") == ["config"]
    with pytest.raises(RuntimeError), replacing(tmp_path / "model") as aside:
        aside.mkdir()
        raise RuntimeError
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config").read_text() == "new"


def test_where_names_are_not_exchanged_in_one_step_two_do(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    test_a_folder_takes_the_place_of_another_whole(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system exchanges names in one step")
def test_whoever_reads_a_folder_while_it_is_replaced_finds_it_and_keeps_what_is_open(tmp_path, monkeypatch):
    target, found = tmp_path / "model", []
    write_folder(target, config="old")
    for step in ("rename", "replace"):
        real = getattr(Path, step)
        monkeypatch.setattr(Path, step, lambda *args, real=real: (real(*args), found.append(target.exists())))
    with (target / "config").open() as held:
        write_folder(target, config="new")
        assert held.read() == "old" and (target / "config").read_text() == "new"
    assert all(found)


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    happened = []
    for owner, name in ((os, "fsync"), (Path, "rename"), (Path, "replace")):
        real = getattr(owner, name)

        def seen(what, *args, real=real):
            happened.append(os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else f"move {what}")
            return real(what, *args)

        monkeypatch.setattr(owner, name, seen)
    write_folder(tmp_path / "model", config="old", weights="old")
    aside = f"{tmp_path}/.model{NEW}"
    assert sorted(happened[:2]) == [f"{aside}/config", f"{aside}/weights"]
    assert happened[2:] == [aside, f"move {aside}", str(tmp_path)]


@pytest.mark.parametrize("suffix", [NEW, OLD, f".0123456789abcdef{NEW}"])
def test_what_a_killed_process_left_goes_with_the_next_write_into_the_folder(tmp_path, suffix):
    write_folder(tmp_path / "model", config="whole")
    (tmp_path / f".step=1.ckpt{suffix}").write_text("half of a file")
    (tmp_path / f".model{suffix}").mkdir()
    (tmp_path / f".model{suffix}" / "config").write_text("half of a folder")
    (tmp_path / ".hidden.new").write_text("a user's")
    write_lines(["whole"], tmp_path / "file")
    assert {*names(tmp_path)} - {"step=1.ckpt"} == {".hidden.new", "file", "model"}
    assert (tmp_path / "model" / "config").read_text() == "whole"


def test_what_a_living_process_is_writing_stays(tmp_path):
    with replacing(tmp_path / "a") as aside:
        aside.write_text("half")
        write_lines(["whole"], tmp_path / "b")
        assert aside.read_text() == "half"
    assert names(tmp_path) == ["a", "b"]


def test_where_no_lock_tells_the_dead_from_the_living_their_age_does(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    old, fresh = tmp_path / f".old{NEW}", tmp_path / f".fresh{NEW}"
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "weights").write_text("half")
    for path in (old / "weights", old, fresh):  # of `fresh` the file alone has just been written
        os.utime(path, (0, path.stat().st_mtime - SECONDS_TO_DOUBT - 1))
    write_lines(["whole"], tmp_path / "file")
    assert names(tmp_path) == [f".fresh{NEW}", "file"]


@pytest.mark.parametrize("heals", [heal, lambda target: write_lines(["another"], target.with_name("file"))])
def test_a_kill_between_the_two_names_of_a_folder_leaves_the_new_one_to_the_next_who_looks(tmp_path, heals):
    for name in ("new", "old"):
        (tmp_path / f".model.lit_rlhf-{name}").mkdir()
        (tmp_path / f".model.lit_rlhf-{name}" / "config").write_text(name)
    heals(tmp_path / "model")
    assert (tmp_path / "model" / "config").read_text() == "new"
    write_lines(["another"], tmp_path / "file")
    assert names(tmp_path) == ["file", "model"]


def test_a_folder_that_could_not_get_its_name_leaves_the_old_one_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    write_folder(tmp_path / "model", config="old")
    real = Path.rename

    def refuse(self, target):
        if self.name.endswith(NEW):
            raise OSError(errno.EACCES, "Permission denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="Permission denied") as told:
        write_folder(tmp_path / "model", config="new")
    assert told.value.filename == str(tmp_path / "model")
    assert names(tmp_path) == ["model"] and (tmp_path / "model" / "config").read_text() == "old"


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
    assert names(tmp_path) == ["file"]


def test_json_holds_null_where_a_metric_is_no_number(tmp_path):
    write_json({"metrics": {"val/loss": float("nan")}}, tmp_path / "summary.json")
    assert json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail) == {
        "metrics": {"val/loss": None}
    }


def test_a_folder_that_may_not_be_written_to_is_told_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests may be allowed everything
    with pytest.raises(UserError, match=f"output: {tmp_path} may not be written to"):
        make_room(tmp_path / "x.json", "output", ".json")


def test_a_folder_whose_name_is_no_utf_8_is_told_before_it_is_made(tmp_path):
    with pytest.raises(UserError, match=r"^root: \S+ has letters that this system's encoding lacks"):
        make_folder(tmp_path / "\udcc3\udcbc", "root")
    assert not list(tmp_path.iterdir())
