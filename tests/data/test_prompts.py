import os

import datasets
import numpy as np
import pytest

from lit_rlhf.data import prompts, token_cache
from lit_rlhf.data.modules import load_prompts
from lit_rlhf.data.reader import Options
from lit_rlhf.data.token_cache import cached_rows
from lit_rlhf.data.tokenize import KEPT, LONG_PROMPT, TRUNCATED
from lit_rlhf.errors import UserError
from tests.data.small_rows import WORDS, write
from tests.tiny_tokenizers import CHATML, byte_tokenizer, word_tokenizer


def test_load_prompts_keeps_columns_that_only_some_rows_have(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how", "answer": 3}, {"prompt": "so", "note": [1, "x"]}])
    loaded = load_prompts(source, "train", word_tokenizer(WORDS))
    assert [ids.dtype for ids in loaded.prompt_ids] == [np.int64] * 2
    assert loaded.columns == {"prompt": ["how", "so"], "answer": [3, None], "note": [None, [1, "x"]]}


def test_prompts_are_tokenised_once_by_several_processes_and_then_found(tmp_path, monkeypatch):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how so", "answer": i} for i in range(8)])
    tokenizer, calls = word_tokenizer(WORDS), []
    in_order = load_prompts(source, "train", tokenizer).prompt_ids
    real = token_cache.FUNCTIONS["prompts"]
    monkeypatch.setitem(
        token_cache.FUNCTIONS, "prompts", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    )
    found = load_prompts(source, "train", tokenizer)
    assert not calls and found.columns["answer"] == list(range(8))
    assert [ids.tolist() for ids in found.prompt_ids] == [ids.tolist() for ids in in_order]
    with pytest.warns(UserWarning, match="8 of 8 rows are not used whole"):
        shorter = load_prompts(source, "train", tokenizer, Options(None, max_prompt_length=1))
    assert calls and [len(ids) for ids in shorter.prompt_ids] == [1] * 8
    monkeypatch.setitem(token_cache.FUNCTIONS, "prompts", real)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    parallel = load_prompts(source, "train", tokenizer, num_proc=2)
    assert [ids.tolist() for ids in parallel.prompt_ids] == [ids.tolist() for ids in in_order]


def test_prompts_to_be_scored_bring_their_responses_along_in_whatever_form(tmp_path):
    ask, answer = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": ask, "completion": answer},
        {"prompt": ask, "completion": "yes"},
        {"prompt": [*ask, {"role": "assistant", "content": "y"}], "completion": "es"},
        {"prompt": "q", "completion": "yes"},
    ]
    tokenizer = byte_tokenizer(CHATML)
    prompts = load_prompts(write(tmp_path / "p.jsonl", rows), "predict", tokenizer, kind="scored")
    assert prompts.columns["completion"] == [answer, "yes", "es", "yes"], "as they stand in the data"
    texts = [tokenizer.decode(ids) for ids in prompts.response_ids]
    assert texts == ["yes<|im_end|>", "yes<|im_end|>", "es<|im_end|>", "yes<eos>"]
    header = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in prompts.prompt_ids] == [header, header, header + "y", "q"]
    batch = prompts.take(np.array([2, 0]))
    assert [tokenizer.decode(ids) for ids in batch.response_ids] == [texts[2], texts[0]]
    assert (
        load_prompts(write(tmp_path / "q.jsonl", rows), "predict", tokenizer).take(np.array([0])).response_ids is None
    )


def test_what_is_too_long_to_be_scored_is_cut_at_the_far_ends_and_counted(tmp_path):
    tokenizer = word_tokenizer("a b c d", bos=True)
    rows = [
        {"prompt": "a b c", "completion": " a b c d"},
        {"prompt": "a b c", "completion": ""},
        {"prompt": "a", "completion": " b"},
    ]
    options = Options(6, max_prompt_length=3)
    columns = token_cache.FUNCTIONS["scored"](rows, tokenizer, options)
    tokens = [[tokenizer.convert_ids_to_tokens(i.tolist()) for i in columns[n]] for n in ("prompt_ids", "response_ids")]
    assert tokens[0] == [["<bos>", " b", " c"], ["<bos>", " b", " c"], ["<bos>", "a"]]
    assert tokens[1] == [[" a", " b", " c"], ["<eos>"], [" b", "<eos>"]]
    assert columns["status"] == [TRUNCATED, TRUNCATED, KEPT]
    assert token_cache.FUNCTIONS["scored"](rows[:1], tokenizer, Options(3))["status"] == [LONG_PROMPT]


def test_ids_are_those_of_the_columns_beside_them_whatever_happens_to_the_file(tmp_path, monkeypatch):
    tokenizer, order = word_tokenizer(WORDS), [{"prompt": "how", "answer": "how"}, {"prompt": "yes", "answer": "yes"}]

    def paired():
        loaded = load_prompts(str(tmp_path / "p.jsonl"), "train", tokenizer)
        return [tokenizer.decode(ids) for ids in loaded.prompt_ids] == loaded.columns["answer"]

    for rows in (order, order[::-1]):
        os.utime(write(tmp_path / "p.jsonl", rows), (1e9, 1e9))
        assert paired()
    monkeypatch.setattr(prompts, "cached_rows", lambda *a: write(tmp_path / "p.jsonl", order) and cached_rows(*a))
    assert paired(), "the file changed between its reading and its tokens"


def test_a_prompt_that_the_template_refuses_is_named_by_the_line_of_its_row(tmp_path):
    answer = {"role": "assistant", "content": "a"}
    chats = [[{"role": role, "content": "q"}, answer] for role in ("user", "banana")]
    held_out = write(tmp_path / "sft.jsonl", [{"text": "no prompt"}, *({"messages": chat} for chat in chats)])
    asked = write(tmp_path / "p.jsonl", [{"prompt": chat[:1]} for chat in chats])
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    with pytest.raises(UserError, match=r"p\.jsonl, line 2: the chat template refuses a conversation"):
        load_prompts(asked, "train", tokenizer)
    with pytest.raises(UserError, match=r"sft\.jsonl, line 3: the chat template refuses a conversation"):
        load_prompts(held_out, "validation", tokenizer, of="sft")


def test_half_a_character_in_any_column_is_named_since_predict_writes_them_all(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "how"}\n{"prompt": "how", "note": ["\\ud83d"]}\n')
    with pytest.raises(UserError, match=r"p\.jsonl, line 2, column 'note', at \[0\]: '\\ud83d' is half of a character"):
        load_prompts(str(tmp_path / "p.jsonl"), "predict", word_tokenizer(WORDS))


def test_rows_without_a_prompt_of_their_own_leave_none(tmp_path):
    source = write(tmp_path / "texts.jsonl", [{"text": "how so"}])
    assert len(load_prompts(source, "validation", word_tokenizer(WORDS), of="sft")) == 0


@pytest.mark.filterwarnings("ignore:.*are not used whole")
def test_each_prompt_knows_file_and_line_that_it_comes_from(tmp_path):
    empty = {"prompt": ""}  # dropped: no token
    first = tmp_path / "a.jsonl"
    first.write_text('{"prompt": "how"}\n\n{"prompt": ""}\n{"prompt": "so"}\n')
    second = write(tmp_path / "b.jsonl", [empty, {"prompt": "so how"}])
    loaded = load_prompts({str(first): 1.0, second: 2.0}, "train", word_tokenizer(WORDS))
    batch = loaded.take(np.arange(len(loaded)))
    expected = [f"{first}, line 1", f"{first}, line 4", f"{second}, line 2", f"{second}, line 2"]
    assert [batch.place(index) for index in range(4)] == expected
    assert loaded.take(np.array([3, 1])).place(1) == expected[1]  # by its place in the batch
    first.write_text("")
    assert batch.place(1) == "prompt 2" and batch.place(2) == expected[2]
    first.unlink()
    assert batch.place(0) == "prompt 1"
    assert prompts.PromptBatch(batch.prompt_ids, {}).place(3) == "prompt 4"
