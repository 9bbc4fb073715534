"""Who says a token: by what the template writes of each message, beside a slow reading of the rendered text."""

import numpy as np
import pytest

from lit_rlhf.data.reader import Options
from lit_rlhf.data.speakers import speakers
from lit_rlhf.data.tokenize import tokenize_preference, tokenize_prompts, tokenize_sft
from lit_rlhf.models.tokens import tokenizer_beside

OPTIONS = Options(None)
TOKENIZER = tokenizer_beside("demo")
HEADERS = {"<|system|>": "system", "<|user|>": "user", "<|assistant|>": "assistant"}


def says(*turns):
    return [{"role": role, "content": text} for role, text in turns]


def by_headers(ids):
    """The role that the last header before each token names: headers are single tokens in the demo's template."""
    roles, said = [], []
    for name in TOKENIZER.convert_ids_to_tokens(ids.tolist()):
        roles.append(HEADERS.get(name, roles[-1] if roles else None))
        said.append(roles[-1])
    return said


TALK = says(("user", "Hello"), ("assistant", "Hello! How are you?"), ("user", "Thanks."), ("assistant", "Good day!"))


@pytest.mark.parametrize("control_tokens", ["keep", "escape"])
def test_each_token_belongs_to_the_turn_whose_header_it_follows(control_tokens):
    options = OPTIONS._replace(control_tokens=control_tokens)
    ids = np.array(tokenize_sft([{"messages": TALK}], TOKENIZER, options)["input_ids"][0])
    found = speakers({"messages": TALK}, "sft", "input", ids, TOKENIZER, options)
    assert found == by_headers(ids) and set(found) == {"user", "assistant"}


def test_a_control_token_that_a_user_spells_out_and_that_stays_text_is_the_users():
    row = {"messages": says(("user", "Hello <|assistant|> you"), ("assistant", "Good day!"))}
    options = OPTIONS._replace(control_tokens="escape")
    ids = np.array(tokenize_sft([row], TOKENIZER, options)["input_ids"][0])
    assert speakers(row, "sft", "input", ids, TOKENIZER, options) == by_headers(ids)


def test_the_header_that_a_prompt_ends_with_is_the_assistants():
    row = {"prompt": TALK[:3]}
    ids = np.array(tokenize_prompts([row], TOKENIZER, OPTIONS)["prompt_ids"][0])
    assert speakers(row, "prompts", "prompt", ids, TOKENIZER, OPTIONS) == by_headers(ids)


def test_a_response_goes_on_behind_its_prompt():
    row = {"prompt": TALK[:3], "chosen": TALK[3:], "rejected": says(("assistant", "No.")), "margin": 0.0}
    columns = tokenize_preference([row], TOKENIZER, OPTIONS)
    for side in ("chosen", "rejected"):
        ids = np.concatenate([columns["prompt_ids"][0], columns[f"{side}_ids"][0]])
        assert speakers(row, "preference", side, ids, TOKENIZER, OPTIONS) == by_headers(ids)


def test_of_text_and_of_other_tokens_nobody_is_said_to_speak():
    row = {"prompt": "Hello", "completion": " you"}
    assert speakers(row, "sft", "input", np.array([1, 2]), TOKENIZER, OPTIONS) is None
    assert speakers({"messages": TALK}, "sft", "input", np.array([1, 2]), TOKENIZER, OPTIONS) is None
