import numpy as np
import pytest

from lit_rlhf.data.texts import as_texts, pieces
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


class Bytes:
    """A tokenizer of bytes, as of byte-level models: characters beyond ASCII are several tokens."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


class Words:
    """A tokenizer that writes a space before each word but the first, as SentencePiece decodes."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids)


def test_pieces_make_up_the_text_and_a_character_stands_at_its_last_token():
    text = "Grüße, 你好 🙂! " * 9
    parts = pieces(Bytes(), np.frombuffer(text.encode(), dtype=np.uint8))
    assert "".join(parts) == text and len(parts) == len(text.encode())
    assert parts[:5] == ["G", "r", "", "ü", ""]


def test_pieces_keep_the_spaces_that_a_decoder_writes_between_tokens_however_long_the_text():
    parts = pieces(Words(), np.arange(60))
    assert parts[:3] == ["w0", " w1", " w2"] and "".join(parts) == Words().decode(range(60), False)


def test_half_a_character_at_the_end_is_shown_as_such():
    assert pieces(Bytes(), np.frombuffer("aü".encode()[:2], dtype=np.uint8)) == ["a", "\ufffd"]
