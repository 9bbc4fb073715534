import errno
import multiprocessing
import os
import warnings
from pathlib import Path

import datasets
import pytest

from lit_rlhf.data import token_cache
from lit_rlhf.data.modules import PreferenceDataModule, SFTDataModule
from lit_rlhf.errors import UserError
from tests.data.small_rows import WORDS, attach, sft_file, write
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer


def tokens(source, tokenizer=None, **options):
    """The ids that an epoch of SFT learns from."""
    tokenizer = tokenizer or word_tokenizer(WORDS)
    module = attach(SFTDataModule(source, None, tokenizer=tokenizer, **options))
    return module.datasets["train"].table.with_format(None)["input_ids"][:]


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches that were tokenised rather than found."""
    counts, real = [], token_cache.FUNCTIONS["sft"]
    monkeypatch.setitem(token_cache.FUNCTIONS, "sft", lambda *a, **k: counts.append(1) or real(*a, **k))
    return counts


def test_tokens_come_from_the_cache_until_file_tokenizer_or_options_change(tmp_path, calls):
    source, tokenizer = sft_file(tmp_path), word_tokenizer(WORDS)

    def tokenized_anew(tokenizer=tokenizer, **options):
        calls.clear()
        attach(SFTDataModule(source, None, tokenizer=tokenizer, **options))
        return bool(calls)

    assert tokenized_anew()
    tokenizer("a call leaves state behind", truncation=True, max_length=3)
    assert not tokenized_anew()
    assert tokenized_anew(max_length=7)
    assert tokenized_anew(control_tokens="escape")
    assert tokenized_anew(loss_on="all")
    assert tokenized_anew(tokenizer=word_tokenizer(WORDS + " new"))
    assert tokenized_anew(chat_template=CHATML)
    write(tmp_path / "sft.jsonl", [{"prompt": "so", "completion": " yes"}])
    assert tokenized_anew()


def test_several_processes_tokenise_to_the_same_rows(tmp_path, monkeypatch):
    source = sft_file(tmp_path)
    one = attach(SFTDataModule(source, None, tokenizer=word_tokenizer(WORDS))).datasets["train"]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = attach(SFTDataModule(source, None, num_proc=2, tokenizer=word_tokenizer(WORDS))).datasets["train"]
    assert one.table.with_format(None)[:] == two.table.with_format(None)[:]
    assert not multiprocessing.active_children()


def test_a_file_mended_at_the_same_size_and_time_is_read_again(tmp_path, calls):
    ids = []
    for word in (" yes", " how"):
        source = write(tmp_path / "a.jsonl", [{"prompt": "so", "completion": word}])
        os.utime(source, (1e9, 1e9))
        ids.append(tokens(source))
    assert ids[0] != ids[1]
    Path(source).rename(tmp_path / "b.jsonl")
    calls.clear()
    assert tokens(str(tmp_path / "b.jsonl")) == ids[1] and not calls, "the same content by another name"


def test_a_mended_library_makes_its_tokens_anew(tmp_path, calls, monkeypatch):
    source = sft_file(tmp_path)
    tokens(source)
    monkeypatch.setattr(token_cache, "_code", lambda: b"mended")
    calls.clear()
    tokens(source)
    assert calls


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 500])
@pytest.mark.parametrize("pattern", ["generator-*.arrow", "cache-*.arrow", "dataset_info.json"])
def test_a_damaged_cache_is_made_anew(tmp_path, pattern, damage):
    source = sft_file(tmp_path)
    whole = tokens(source)
    (file,) = Path(datasets.config.HF_DATASETS_CACHE).rglob(pattern)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="the cache of tokens holds cannot be read .* anew"):
        assert tokens(source) == whole
    assert tokens(source) == whole


@pytest.mark.parametrize("lost", ["version_str", "features", "splits", "num_examples", "_type", "dtype"])
def test_a_cache_whose_facts_lack_a_name_is_made_anew_or_read_as_it_was(tmp_path, lost):
    source = sft_file(tmp_path)
    whole = tokens(source)
    (file,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("dataset_info.json")
    text = file.read_text()
    file.write_text(text.replace(f'"{lost}"', '"none_of_it"'))
    assert file.read_text() != text
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="what the cache of tokens holds cannot be read")
        assert tokens(source) == whole
    file.write_text("{}")
    with pytest.warns(UserWarning, match="the cache of tokens holds cannot be read .* anew"):
        assert tokens(source) == whole


@pytest.mark.parametrize("folder", ["a_file/x", "/proc/x"])
def test_a_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(tmp_path, monkeypatch, folder):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / folder)
    with pytest.raises(UserError, match=rf"the cache of tokens in .*{folder} cannot be written .*HF_DATASETS_CACHE"):
        tokens(sft_file(tmp_path))


@pytest.mark.parametrize("what", ["_prepare_split_single", "download_and_prepare"])
def test_a_disk_that_is_full_is_told_with_the_cache_that_it_holds(tmp_path, monkeypatch, what):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.packaged_modules.generator.generator.Generator, what, full)
    with pytest.raises(UserError, match=r"^the cache of tokens in .* cannot be written \(.*No space left on device.*$"):
        tokens(sft_file(tmp_path))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of a file that `datasets` leaves open
@pytest.mark.parametrize("fails", ["finalize", "close"])
def test_a_disk_that_is_full_at_the_end_of_the_tokens_is_told_too_and_leaves_no_half_of_them(
    tmp_path, monkeypatch, fails
):
    source = sft_file(tmp_path)
    expected, real, calls = tokens(source), datasets.arrow_writer.ArrowWriter.finalize, []

    def full(writer, *args, **kwargs):
        calls.append(writer)
        if fails == "close" and len(calls) > 1:  # as a stream that could not be closed answers the second time
            raise ValueError("I/O operation on closed file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    with pytest.raises(UserError, match=r"^the cache of tokens in .* cannot be written \(.*No space left on device.*$"):
        tokens(source, truncation="drop")
    assert not list(Path(datasets.config.HF_DATASETS_CACHE).rglob("tmp*"))
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", real)
    assert tokens(source, truncation="drop") == expected


def test_what_a_killed_process_left_of_tokens_goes_with_the_next_that_makes_some(tmp_path):
    source = sft_file(tmp_path)
    tokens(source)
    (made,) = Path(datasets.config.HF_DATASETS_CACHE).rglob("cache-*.arrow")
    (made.parent / "tmp0123abcd").write_text("half")
    tokens(source)
    assert {path.name for path in made.parent.glob("*.arrow")} == {made.name, "generator-train.arrow"}
    assert not list(made.parent.glob("tmp*"))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source, real = sft_file(tmp_path), token_cache.placed_rows

    def slowly(*args):
        for number, placed in enumerate(real(*args)):
            if number == 10:
                with open(source, "a") as file:
                    file.write('{"text": "how"}\n')
            yield placed

    monkeypatch.setattr(token_cache, "placed_rows", slowly)
    with pytest.raises(UserError, match=r"sft\.jsonl: it changed while it was read; start again when nothing writes"):
        tokens(source)
    monkeypatch.setattr(token_cache, "placed_rows", real)
    assert len(tokens(source)) == 21


STRICT = (
    "{% for m in messages %}{% if m.role == 'banana' %}{{ raise_exception('no banana') }}{% endif %}{% endfor %}"
    + CHATML
)
GOOD = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
BAD = [{"role": "banana", "content": "q"}, GOOD[1]]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_row_that_the_template_refuses_is_named_by_file_and_line(tmp_path, num_proc):
    source = write(tmp_path / "chats.jsonl", [{"messages": GOOD}, {"messages": GOOD}, {"messages": BAD}])
    options = {"chat_template": STRICT, "num_proc": num_proc}
    with pytest.raises(UserError, match=r"chats\.jsonl, line 3: the chat template refuses .*banana.*: no banana$"):
        tokens(source, byte_tokenizer(), **options)
    answers = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    rows = [{"prompt": turns[:1], **answers} for turns in (GOOD, BAD)]
    module = PreferenceDataModule(write(tmp_path / "pairs.jsonl", rows), None, tokenizer=byte_tokenizer(), **options)
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2: the chat template refuses"):
        attach(module)


def test_what_the_tokenizer_lacks_is_no_rows_fault(tmp_path):
    source = write(tmp_path / "chats.jsonl", [{"messages": GOOD}])
    with pytest.raises(UserError, match=r"^chat_template: the chat template is not valid Jinja"):
        tokens(source, byte_tokenizer(), chat_template="{% if")


def test_what_stands_beside_the_content_of_a_message_is_text_or_named(tmp_path):
    deep = "[" * 1000 + "]" * 1000
    line = '{"messages": [{"role": "user", "content": "q", "x": %s}, {"role": "assistant", "content": "a"}]}\n'
    (tmp_path / "deep.jsonl").write_text('{"text": "how"}\n' + line % deep)
    with pytest.raises(UserError, match=r"deep\.jsonl, line 2: nested too deep"):
        tokens(str(tmp_path / "deep.jsonl"), byte_tokenizer(), chat_template=CHATML)
    (tmp_path / "half.jsonl").write_text('{"text": "how"}\n' + line % '"\\ud83d"')
    with pytest.raises(UserError, match=r"half\.jsonl, line 2, column 'messages', at \[0\]\.x: '\\ud83d' is half of a"):
        tokens(str(tmp_path / "half.jsonl"), byte_tokenizer(), chat_template=CHATML)
