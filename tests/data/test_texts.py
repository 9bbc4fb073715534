import numpy as np
import pytest

from lit_rlhf.data.texts import as_texts
from tests.tiny_tokenizers import byte_tokenizer, metaspace_tokenizer


@pytest.mark.parametrize(
    "tokenizer", [byte_tokenizer(), metaspace_tokenizer("to be or not")], ids=["bytes", "metaspace"]
)
def test_prompt_and_response_make_the_text_again(tokenizer):
    ids = np.array(tokenizer("to be or not to be")["input_ids"])
    for cut in range(1, len(ids)):
        assert "".join(as_texts(tokenizer, ids[:cut], ids[cut:])) == "to be or not to be"


@pytest.mark.parametrize("response", ["    y = x\n    return y\n", "\n\n", " ", "", "\ttab ", "é"])
def test_white_space_stands_where_it_was_written(response):
    tokenizer = byte_tokenizer()
    prompt, ids = (np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in (" def f(x):\n", response))
    assert as_texts(tokenizer, prompt, ids) == (" def f(x):\n", response)


def test_special_tokens_are_written_if_asked_for():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    prompt, ids = (np.array(tokenizer(text)["input_ids"]) for text in ("<think>a", "<think>2+2</think>4<eos>"))
    assert as_texts(tokenizer, prompt, ids) == ("a", "2+24")
    assert as_texts(tokenizer, prompt, ids, special=True) == ("<think>a", "<think>2+2</think>4<eos>")


def test_a_character_that_the_boundary_cuts_is_no_reason_to_lose_the_rest():
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("é b")["input_ids"])
    assert as_texts(tokenizer, ids[:1], ids[1:])[1].endswith(" b")
