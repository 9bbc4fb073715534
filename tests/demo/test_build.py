"""The embedded tokenizer and configuration are what `build` makes, and fit each other."""

import json

import pytest
from transformers import AutoConfig, AutoTokenizer

from lit_rlhf.demo import MODEL_DIR
from lit_rlhf.demo.build import build
from tests.demo.conversations import BEST, PROMPT, content


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_any_text_comes_back_from_the_tokenizer(tokenizer, demonstrations):
    texts = [content(row["completion"]) for row in demonstrations[:200]]
    for text in [*texts, PROMPT, "Zażółć gęślą jaźń, 漢字 🙂\n\ttabs  and spaces "]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_generation_prompt_is_a_prefix_of_the_whole_conversation(tokenizer, demonstrations):
    for row in demonstrations:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert whole[-1] == tokenizer.eos_token_id
        assert len(prompt) <= 32 and len(whole) - len(prompt) <= 48


def test_template_marks_the_assistant_s_tokens_with_the_end_token(tokenizer):
    messages = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": BEST}]
    encoded = tokenizer.apply_chat_template(messages * 2, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, keep in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if keep]
    assert tokenizer.decode(marked) == (BEST + "<|end|>") * 2


def test_template_refuses_a_role_it_does_not_know(tokenizer):
    with pytest.raises(Exception, match="the roles are user and assistant, not system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_tokens_of_plain_text_do_not_merge_over_the_boundary(tokenizer):
    ids = [tokenizer(text)["input_ids"] for text in (PROMPT, BEST, PROMPT + BEST)]
    assert ids[0] + ids[1] == ids[2]


def test_configuration_fits_the_tokenizer(tokenizer):
    config = AutoConfig.from_pretrained(MODEL_DIR)
    assert config.vocab_size == len(tokenizer)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_shipped_folder_is_what_build_makes(tmp_path):
    build(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in MODEL_DIR.iterdir()}
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL_DIR / name).read_bytes(), name
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        made, shipped = (json.loads((folder / name).read_text()) for folder in (tmp_path, MODEL_DIR))
        made.pop("transformers_version", None), shipped.pop("transformers_version", None)  # of whoever ran it
        assert made == shipped, name
