import datasets
import numpy as np

from lit_rlhf.data import examples
from lit_rlhf.data.modules import load_prompts
from tests.data.small_rows import WORDS, write
from tests.tiny_tokenizers import word_tokenizer


def test_load_prompts_keeps_columns_that_only_some_rows_have(tmp_path):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how", "answer": 3}, {"prompt": "so", "note": [1, "x"]}])
    prompt_ids, columns = load_prompts(source, "train", word_tokenizer(WORDS))
    assert [ids.dtype for ids in prompt_ids] == [np.int64] * 2
    assert columns == {"prompt": ["how", "so"], "answer": [3, None], "note": [None, [1, "x"]]}


def test_prompts_are_tokenised_once_by_several_processes_and_then_found(tmp_path, monkeypatch):
    source = write(tmp_path / "p.jsonl", [{"prompt": "how so", "answer": i} for i in range(8)])
    tokenizer, calls = word_tokenizer(WORDS), []
    in_order, _ = load_prompts(source, "train", tokenizer)
    real = examples.FUNCTIONS["prompts"]
    monkeypatch.setitem(examples.FUNCTIONS, "prompts", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    found, columns = load_prompts(source, "train", tokenizer)
    assert not calls and columns["answer"] == list(range(8))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in in_order]
    shorter, _ = load_prompts(source, "train", tokenizer, max_prompt_length=1)
    assert calls and [len(ids) for ids in shorter] == [1] * 8
    monkeypatch.setitem(examples.FUNCTIONS, "prompts", real)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    parallel, _ = load_prompts(source, "train", tokenizer, num_proc=2)
    assert [ids.tolist() for ids in parallel] == [ids.tolist() for ids in in_order]
