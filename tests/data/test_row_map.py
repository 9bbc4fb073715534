import errno
import os
import signal
from pathlib import Path

import datasets
import pytest

from lit_rlhf.data import token_cache
from lit_rlhf.data.modules import SFTDataModule
from lit_rlhf.errors import UserError
from tests.data.small_rows import WORDS, attach, sft_file
from tests.tiny_tokenizers import word_tokenizer


@pytest.fixture(autouse=True)
def no_pool(monkeypatch):
    """The pool of `datasets` may wait for ever for a process that is gone."""

    def refuse(*args):
        raise AssertionError("a pool is made")

    older = datasets.arrow_dataset  # which has the name itself
    monkeypatch.setattr(getattr(older, "mp", older), "Pool", refuse)


def tokens(source, num_proc=2):
    module = attach(SFTDataModule(source, None, num_proc=num_proc, tokenizer=word_tokenizer(WORDS)))
    return module.datasets["train"].table.with_format(None)[:]


def kept():
    """The files of tokens in the cache."""
    return sorted(Path(datasets.config.HF_DATASETS_CACHE).rglob("cache-*.arrow"))


def test_a_process_that_is_killed_is_one_line_and_the_next_run_makes_what_is_missing(tmp_path, monkeypatch):
    source, real = sft_file(tmp_path), token_cache.FUNCTIONS["sft"]
    monkeypatch.setitem(token_cache.FUNCTIONS, "sft", lambda *given: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(
        UserError, match=r"^a process of num_proc \(2\) was ended by SIGKILL as it tokenised from .*sft"
    ):
        tokens(source)
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("tmp*"))
    monkeypatch.setitem(token_cache.FUNCTIONS, "sft", real)
    assert tokens(source) == tokens(source, num_proc=None)


@pytest.mark.parametrize("later", [None, 1, 3, 64])
def test_tokens_of_one_number_of_processes_serve_any_other(tmp_path, later, monkeypatch):
    source = sft_file(tmp_path)
    made = tokens(source)
    assert [file.stem[-15:] for file in kept()] == ["_00000_of_00002", "_00001_of_00002"]
    monkeypatch.setitem(token_cache.FUNCTIONS, "sft", None)
    assert tokens(source, num_proc=later) == made


@pytest.mark.parametrize("later", [None, 2, 3])
def test_a_part_that_is_missing_or_damaged_is_made_anew(tmp_path, later):
    source = sft_file(tmp_path)
    made = tokens(source)
    kept()[0].unlink()
    assert tokens(source, num_proc=later) == made
    for file in kept():
        file.write_bytes(file.read_bytes()[:50])
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tokens(source, num_proc=later) == made


def test_a_disk_that_is_full_is_told_from_any_process(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise ValueError("I/O operation on closed file")  # as `datasets` says it

    source = sft_file(tmp_path)
    tokens(source, num_proc=None)
    kept()[0].unlink()
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    with pytest.raises(UserError, match=r"^the cache of tokens in .* cannot be written \(.*No space left on device.*$"):
        tokens(source)
