"""What a disk or file system would not do, in one line."""

import errno
import os

import pytest
from safetensors import SafetensorError

from lit_rlhf.cli.disk_errors import disk_error, refused_by_disk
from lit_rlhf.cli.mistakes import users_mistake


def test_a_full_disk_is_named_and_an_unknown_failure_keeps_its_traceback(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device", "runs/sft/last.ckpt")
    wrapped = RuntimeError("while saving")
    wrapped.__cause__ = full
    assert str(users_mistake(wrapped)) == "runs/sft/last.ckpt: No space left on device"
    assert users_mistake(RuntimeError("a mistake of ours")) is None
    told = str(users_mistake(OSError(errno.ENOSPC, "No space left on device"), tmp_path))  # a library does not name it
    assert told.startswith(f"No space left on device, while files of {tmp_path} were written; ")
    assert told.endswith(" MB are free there")


@pytest.mark.parametrize("number", [errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EFBIG, errno.EROFS])
def test_what_a_file_system_would_not_do_is_told_by_the_file(number, tmp_path):
    file = tmp_path / "a file"
    file.touch()
    told = str(users_mistake(OSError(number, os.strerror(number), str(file))))
    assert told.startswith(f"{file}: {os.strerror(number)}")
    assert told.endswith(", and is no folder") == (number == errno.EEXIST)


def test_a_limit_on_the_size_of_files_is_told_by_what_sets_it(tmp_path):
    told = str(users_mistake(OSError(errno.EFBIG, "File too large"), tmp_path))
    assert told.startswith(f"File too large, while files of {tmp_path} were written; `ulimit -f`")


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (Exception("No space left on device (os error 28)"), errno.ENOSPC),
        (SafetensorError("I/O error: File too large (os error 27)"), errno.EFBIG),
        (OSError(errno.EROFS, "Read-only file system"), errno.EROFS),
        (Exception("Connection refused (os error 111)"), None),
        (OSError(errno.ECONNREFUSED, "Connection refused"), None),
        (ValueError("a text that says (os error 28)"), None),
        (Exception("another"), None),
    ],
)
def test_what_libraries_in_rust_say_of_a_disk_is_told_as_what_the_others_do(error, number, tmp_path):
    refused = refused_by_disk(error)
    assert (None if refused is None else refused.errno) == number
    if number == errno.ENOSPC:
        assert disk_error(refused, tmp_path).startswith(f"No space left on device, while files of {tmp_path} were")
