import pytest

from lit_rlhf.data.formats import as_prompt, check_row
from lit_rlhf.errors import UserError

ASK = {"role": "user", "content": "q"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}


@pytest.mark.parametrize(
    ("kind", "row", "kept"),
    [
        ("sft", {"messages": [ASK, YES], "source": "dolly"}, {"messages": [ASK, YES]}),
        ("sft", {"prompt": "q", "completion": "a", "text": "qa"}, {"prompt": "q", "completion": "a"}),
        ("sft", {"prompt": [ASK], "completion": [YES]}, {"prompt": [ASK], "completion": [YES]}),
        ("sft", {"text": "t", "messages": None}, {"text": "t"}),
        ("prompts", {"prompt": "q", "answer": 3}, {"prompt": "q", "answer": 3}),
        (
            "preference",
            {"prompt": "q", "chosen": "y", "rejected": "n", "margin": 2},
            {"prompt": "q", "chosen": "y", "rejected": "n", "margin": 2.0},
        ),
        # two whole conversations: the prompt is what they share
        (
            "preference",
            {"chosen": [ASK, YES], "rejected": [ASK, NO]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "margin": 0.0},
        ),
        # the prompt as text, repeated as the first turn of both
        (
            "preference",
            {"prompt": "q", "chosen": [ASK, YES], "rejected": [ASK, NO]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "margin": 0.0},
        ),
        # equal conversations keep their last message as the response; the tie is counted later
        (
            "preference",
            {"chosen": [ASK, YES], "rejected": [ASK, YES]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [YES], "margin": 0.0},
        ),
    ],
)
def test_a_row_keeps_the_columns_of_its_format(kind, row, kept):
    assert check_row(row, kind, "here") == kept


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", ["a"], "here: expected an object with `messages`"),
        ("sft", {"prompt": "q"}, "here: expected the columns .* found \\['prompt'\\]"),
        ("sft", {"text": 5}, "here, column 'text': expected text, found int \\(5\\)"),
        ("sft", {"messages": "hi"}, "here, column 'messages': expected a message list, found text"),
        ("sft", {"messages": []}, "column 'messages': the message list is empty"),
        ("sft", {"messages": [{"content": "x"}]}, "column 'messages', message 0: expected {\"role\""),
        ("sft", {"messages": [ASK, {"role": "assistant"}]}, "message 1: expected text as `content`, found nothing"),
        ("sft", {"prompt": "q", "completion": [YES]}, "all text or all message lists; 'prompt' is text"),
        ("preference", {"prompt": "q", "chosen": "y"}, "expected the columns `chosen` and `rejected`"),
        ("preference", {"chosen": None, "rejected": "n"}, "found \\['rejected'\\], and null in \\['chosen'\\]$"),
        ("preference", {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [NO]}, "one assistant message .* \\['user'"),
        ("preference", {"chosen": [ASK, YES], "rejected": [YES]}, "must begin with the same messages"),
        (
            "preference",
            {"chosen": "y", "rejected": "n", "margin": "1"},
            "column 'margin': expected a number, found text",
        ),
        ("prompts", {"text": "x"}, "expected the columns `prompt`; found \\['text'\\]"),
    ],
)
def test_a_malformed_row_is_named_with_what_was_found_and_expected(kind, row, message):
    with pytest.raises(UserError, match=message):
        check_row(row, kind, "here")


def test_a_held_out_row_gives_its_prompt_and_the_completion_it_is_known_to_have():
    assert as_prompt({"messages": [ASK, YES]}) == {"prompt": [ASK], "completion": [YES]}
    assert as_prompt({"messages": [ASK]}) is None
    assert as_prompt({"prompt": "q", "completion": "a"}) == {"prompt": "q", "completion": "a"}
    assert as_prompt({"prompt": "q", "chosen": "y", "rejected": "n"}) == {"prompt": "q", "completion": "y"}
    assert as_prompt({"text": "t"}) is None
