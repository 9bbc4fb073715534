import re

import pytest

from lit_rlhf.data.settings import BatchSettings, TokenizationSettings, require_processes
from lit_rlhf.errors import UserError
from tests.tiny_tokenizers import word_tokenizer

BATCHES = {"max_tokens": 64, "batch_size": None, "shuffle": True, "num_workers": 0, "seed": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_tokens": None}, "max_tokens and batch_size are both null: one of them must limit a micro-batch"),
        ({"max_tokens": 0}, "max_tokens (0) must be 1 or more, or null"),
        ({"batch_size": -2}, "batch_size (-2) must be 1 or more, or null"),
        ({"num_workers": -1}, "num_workers (-1) must be 0 or more"),
        ({"seed": -1}, "seed (-1) must be 0 or more"),
    ],
)
def test_batches_without_a_limit_and_counts_that_are_none_are_refused(given, message):
    BatchSettings(**BATCHES)
    with pytest.raises(UserError, match=re.escape(message)):
        BatchSettings(**BATCHES | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": 1}, "max_length (1) must be 2 or more: a prompt and a response"),
        ({"max_prompt_length": 0}, "max_prompt_length (0) must be 1 or more, or null"),
        ({"max_prompt_length": -3}, "max_prompt_length (-3) must be 1 or more, or null"),
        ({"num_proc": 0}, "num_proc (0) must be 1 or more, or null"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_lengths_that_leave_no_token_and_arguments_that_the_template_has_for_itself_are_refused(given, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TokenizationSettings(**given)


def test_rows_have_the_length_that_was_asked_for_or_the_context_and_prompts_half_of_it():
    tokenizer = word_tokenizer("a b")
    tokenizer.model_max_length = 10**30  # unknown
    assert TokenizationSettings().of_examples(tokenizer)[:4] == (None, "truncate", "response", None)
    tokenizer.model_max_length = 16
    assert TokenizationSettings().of_examples(tokenizer)[:4] == (16, "truncate", "response", 8)
    asked = TokenizationSettings(10, "drop", max_prompt_length=3, loss_on="all")
    assert asked.of_examples(tokenizer)[:4] == (10, "drop", "all", 3)
    with pytest.raises(UserError, match=r"max_length \(17\) is more than the model's context of 16"):
        TokenizationSettings(17).of_examples(tokenizer)
    with pytest.raises(UserError, match=r"max_prompt_length \(16\) must be less than the model's context of 16"):
        TokenizationSettings(max_prompt_length=16).of_examples(tokenizer)


def test_prompts_that_are_played_leave_room_for_a_response():
    tokenizer = word_tokenizer("a b")
    tokenizer.model_max_length = 16
    assert TokenizationSettings().of_prompts(tokenizer, 10).max_prompt_length == 6
    assert TokenizationSettings(max_prompt_length=2).of_prompts(tokenizer, 10).max_prompt_length == 2
    with pytest.raises(UserError, match=r"max_new_tokens \(16\) leaves no room for a prompt in the context of 16"):
        TokenizationSettings().of_prompts(tokenizer, 16)


def test_a_number_of_processes_that_no_machine_would_start_is_refused():
    require_processes(None, "num_proc")
    require_processes(64, "num_proc")
    with pytest.raises(UserError, match=r"num_workers \(1000000\) must be at most \d+ on this machine"):
        require_processes(10**6, "num_workers")
