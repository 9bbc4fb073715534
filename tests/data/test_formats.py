import json
from decimal import Decimal

import pytest

from lit_rlhf.data.formats import as_prompt, check_row, to_tokenize
from lit_rlhf.errors import UserError

SYSTEM = {"role": "system", "content": "s"}
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
        # a completion by itself is the half of a pair that its label says
        (
            "unpaired",
            {"prompt": "q", "completion": "y", "label": True, "id": 7},
            {"prompt": "q", "chosen": "y"},
        ),
        ("unpaired", {"prompt": "q", "completion": "n", "label": 0}, {"prompt": "q", "rejected": "n"}),
        ("unpaired", {"prompt": "q", "completion": "y", "label": "True"}, {"prompt": "q", "chosen": "y"}),
        (
            "unpaired",
            {"prompt": [ASK], "completion": "n", "label": False},
            {"prompt": [ASK], "rejected": [NO | {"content": "n"}]},
        ),
        ("unpaired", {"prompt": [ASK], "completion": [ASK, YES], "label": True}, {"prompt": [ASK], "chosen": [YES]}),
        (
            "unpaired",
            {"chosen": [ASK, YES], "rejected": [ASK, NO]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
        ),
    ],
)
def test_a_row_keeps_the_columns_of_its_format(kind, row, kept):
    assert check_row(row, kind, "here") == kept


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("sft", ["a"], "here: expected an object with `messages`"),
        (
            "sft",
            {"prompt": ["a", "b"], "completion": ["c", "d"]},
            "here: columns of many rows, where one row is expected",
        ),
        ("preference", {"chosen": {"0": "a", "1": "b"}, "rejected": {"0": "c", "1": "d"}}, "a row a line"),
        ("prompts", {"prompt": ["a", "b"]}, "columns of many rows"),
        (
            "unpaired",
            {"prompt": "q", "completion": "y"},
            "expected the columns `prompt`, `completion` and `label`, or a",
        ),
        ("unpaired", {"prompt": "q", "completion": "y", "label": None}, "and null in \\['label'\\]"),
        (
            "unpaired",
            {"prompt": "q", "completion": "y", "label": 2},
            "'label': expected true or false, or 1 or 0, found int",
        ),
        ("unpaired", {"prompt": "q", "completion": "y", "label": "good"}, "or 1 or 0, found the text 'good'"),
        ("unpaired", {"prompt": [ASK], "completion": [YES, ASK], "label": 1}, "'completion': expected what follows"),
        (
            "unpaired",
            {"prompt": "q", "chosen": "y"},
            "expected the columns `prompt`, `completion` and `label`, or a pair",
        ),
        ("sft", {"prompt": "q"}, "here: expected the columns .* found \\['prompt'\\]"),
        ("sft", {"text": 5}, "here, column 'text': expected text, found int \\(5\\)"),
        ("sft", {"messages": "hi"}, "here, column 'messages': expected a message list, found text"),
        (
            "sft",
            {"messages": ASK},
            r"column 'messages': expected .* list, found an object .*; put the message into a list",
        ),
        (
            "sft",
            {"messages": {"role": ["user"], "content": ["a"]}},
            "; make a list of objects of it, one of each message",
        ),
        ("sft", {"messages": json.dumps([ASK, YES])}, "column 'messages': found messages written as JSON text"),
        ("prompts", {"prompt": json.dumps([ASK])}, "column 'prompt': found messages written as JSON text"),
        (
            "stepwise",
            {"prompt": ASK, "completions": ["a"], "labels": [1]},
            "column 'prompt': .*; put the message into a",
        ),
        ("preference", {"prompt": [ASK], "chosen": YES, "rejected": [NO]}, "column 'chosen': .*; put the message into"),
        ("preference", {"chosen": json.dumps(YES), "rejected": "n"}, "column 'chosen': found messages written as JSON"),
        ("sft", {"messages": []}, "column 'messages': the list of messages is empty"),
        ("sft", {"messages": [{"content": "x"}]}, "column 'messages', message 0: expected {\"role\""),
        ("sft", {"messages": [ASK, {"role": "assistant"}]}, "message 1: expected text as `content`, found nothing"),
        (
            "sft",
            {"prompt": "q", "completion": [YES]},
            "prompt that is text, a response must be text too; 'prompt' is text",
        ),
        ("preference", {"prompt": "q", "chosen": "y"}, "expected the columns `chosen` and `rejected`"),
        ("preference", {"chosen": None, "rejected": "n"}, "found \\['rejected'\\], and null in \\['chosen'\\]$"),
        (
            "preference",
            {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [NO]},
            "begin and end with the assistant, found \\['user'",
        ),
        ("preference", {"chosen": [ASK, YES], "rejected": [YES]}, "must begin with the same messages"),
        (
            "preference",
            {"chosen": "y", "rejected": "n", "margin": "1"},
            "column 'margin': expected a number, found text",
        ),
        ("prompts", {"text": "x"}, r"`prompt`; found \['text'\]; .* by `columns: \{prompt: ITS_NAME\}` of the data$"),
        ("sft", {"q": "x", "a": "y"}, r"`columns: \{prompt: ITS_NAME, completion: ITS_NAME\}` of the data$"),
        (
            "preference",
            {"prompt": "x", "good": "y"},
            r"`columns: \{chosen: ITS_NAME, rejected: ITS_NAME\}` of the data$",
        ),
        (
            "sft",
            {"instruction": "x", "output": "y"},
            "rows with 'instruction' are read by `format: alpaca` of the data$",
        ),
        (
            "prompts",
            {"conversations": [], "id": 3},
            "rows with 'conversations' are read by `format: sharegpt` of the data$",
        ),
        ("sft", {"text": "x", "tools": [{"name": "f"}]}, "column 'tools': .* this row is text; give messages"),
        ("sft", {"prompt": "q", "completion": "a", "tools": "[{}]"}, "here, column 'tools': it goes to the chat"),
        (
            "preference",
            {"chosen": "y", "rejected": "n", "chat_template_kwargs": {"enable_thinking": False}},
            "column 'chat_template_kwargs': .*columns: {other_name: chat_template_kwargs}",
        ),
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


TOOLS = [{"name": "weather"}]
CALL = {"role": "assistant", "tool_calls": [{"name": "weather", "arguments": {}}]}
RAIN, SUN = {"role": "tool", "content": "rain"}, {"role": "tool", "content": "sun"}


@pytest.mark.parametrize(
    ("kind", "row", "kept"),
    [
        # text beside a prompt of messages is what the assistant says
        ("sft", {"prompt": [ASK], "completion": "yes"}, {"prompt": [ASK], "completion": [YES]}),
        (
            "preference",
            {"prompt": [ASK], "chosen": "yes", "rejected": [NO]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "margin": 0.0},
        ),
        # what the template is to be given stays beside messages; beside text, only what is empty may stand
        (
            "sft",
            {"messages": [ASK, YES], "tools": '[{"name": "weather"}]', "chat_template_kwargs": {"a": 1}, "id": 3},
            {"messages": [ASK, YES], "tools": TOOLS, "chat_template_kwargs": {"a": 1}},
        ),
        ("sft", {"text": "t", "tools": [], "chat_template_kwargs": None}, {"text": "t"}),
        # the prompt in both conversations, as messages or as text, whatever fields are null
        (
            "preference",
            {"prompt": [ASK], "chosen": [ASK, YES], "rejected": [ASK, NO]},
            {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "margin": 0.0},
        ),
        (
            "preference",
            {
                "prompt": "q ",
                "chosen": [{"role": "system", "content": "s"}, {**ASK, "name": None}, {**YES, "name": None}],
                "rejected": [{"role": "system", "content": "s"}, {**ASK, "tool_calls": None}, NO],
                "margin": None,
            },
            {
                "prompt": [{"role": "system", "content": "s"}, ASK],
                "chosen": [YES],
                "rejected": [NO],
                "margin": 0.0,
            },
        ),
        # the same of demonstrations
        ("sft", {"prompt": [ASK], "completion": [ASK, YES]}, {"prompt": [ASK], "completion": [YES]}),
        ("sft", {"prompt": [ASK, YES], "completion": [ASK, NO]}, {"prompt": [ASK, YES], "completion": [ASK, NO]}),
        # tool turns inside a response; where the answers of tools differ, the call before them is the response's
        (
            "preference",
            {"prompt": [ASK], "chosen": [CALL, RAIN, YES], "rejected": [NO], "tools": TOOLS},
            {"prompt": [ASK], "chosen": [CALL, RAIN, YES], "rejected": [NO], "tools": TOOLS, "margin": 0.0},
        ),
        (
            "preference",
            {"chosen": [ASK, CALL, RAIN, SUN, YES], "rejected": [ASK, CALL, RAIN, RAIN, YES]},
            {"prompt": [ASK], "chosen": [CALL, RAIN, SUN, YES], "rejected": [CALL, RAIN, RAIN, YES], "margin": 0.0},
        ),
    ],
)
def test_what_rows_of_messages_say_beside_them_is_kept(kind, row, kept):
    assert check_row(row, kind, "here") == kept


@pytest.mark.parametrize("kind", ["prompts", "scored"])
def test_prompts_keep_every_column_as_it_is_and_are_read_as_messages(kind):
    row = {"prompt": [{**ASK, "name": None}], "completion": "yes", "tools": json.dumps(TOOLS), "answer": 3}
    assert check_row(row, kind, "here") is row
    read = {"prompt": [ASK], "completion": [YES], "tools": TOOLS}
    assert to_tokenize(row, kind) == {name: read[name] for name in read if kind == "scored" or name != "completion"}
    text = {"prompt": "q", "completion": "yes", "tools": "any", "chat_template_kwargs": 3, "image": "a.png"}
    assert check_row(text, kind, "here") is text, "beside text, columns of these names are the user's"


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("preference", {"prompt": "w", "chosen": [ASK, YES], "rejected": [ASK, NO]}, "do not begin with it"),
        ("preference", {"prompt": [ASK], "chosen": [CALL, RAIN], "rejected": [NO]}, "begin and end with the assistant"),
        ("preference", {"prompt": [ASK], "chosen": [ASK], "rejected": [ASK]}, "'chosen': .* found \\[\\]"),
        ("preference", {"prompt": "q", "chosen": [YES], "rejected": "n"}, "a response must be text too"),
        ("preference", {"chosen": [ASK, YES], "rejected": "n"}, "a response must be text too"),
        ("sft", {"prompt": [YES, ASK], "completion": [ASK, YES]}, "message 0 is the last one of 'prompt' again"),
        ("scored", {"prompt": [ASK], "completion": [SYSTEM, ASK, YES]}, "message 1 is the last one of 'prompt'"),
        ("sft", {"messages": [ASK, YES], "tools": "x"}, "here, column 'tools': not valid JSON"),
        ("prompts", {"prompt": [ASK], "tools": 3}, "here, column 'tools': expected a list of objects"),
        ("scored", {"prompt": [ASK], "completion": [{"role": "assistant"}]}, "column 'completion', message 0"),
        ("sft", {"messages": [ASK, YES], "images": ["a.png"]}, "here, column 'images': found a list"),
        ("sft", {"text": "<image>", "image": "a.png"}, "here, column 'image': found text"),
        ("preference", {"prompt": "q", "chosen": "y", "rejected": "n", "audio": {"bytes": b"x"}}, "column 'audio'"),
        ("prompts", {"prompt": [ASK], "videos": ["a.mp4"]}, "column 'videos'"),
    ],
)
def test_rows_of_messages_that_do_not_fit_are_named_too(kind, row, message):
    with pytest.raises(UserError, match=message):
        check_row(row, kind, "here")


def test_the_prompt_of_a_held_out_row_keeps_what_the_template_is_given():
    given = {"tools": TOOLS, "chat_template_kwargs": {"a": 1}}
    assert as_prompt({"messages": [ASK, YES], **given}) == {"prompt": [ASK], "completion": [YES], **given}
    pair = {"prompt": [ASK], "chosen": [CALL, RAIN, YES], "rejected": [NO], "margin": 0.0, **given}
    assert as_prompt(pair) == {"prompt": [ASK], "completion": [CALL, RAIN, YES], **given}


@pytest.mark.parametrize("margin", [2, 0.5, Decimal("0.5"), -3.0e38])
def test_a_margin_is_any_finite_number_that_batches_can_hold(margin):
    row = {"prompt": "q", "chosen": "y", "rejected": "n", "margin": margin}
    assert check_row(row, "preference", "here")["margin"] == float(margin)


@pytest.mark.parametrize(
    ("margin", "found"),
    [
        (float("nan"), r"a finite number, found float \(nan\); null where there is none"),
        (float("-inf"), "a finite number"),
        (1e39, "a finite number"),
        (10**400, r"a finite number, found int \(10*\.\.\.\)"),
        (Decimal("NaN"), "a finite number"),
        (True, r"a number, found bool \(True\)"),
        ([1], "a number, found a list"),
    ],
)
def test_a_margin_that_is_no_finite_number_is_named(margin, found):
    with pytest.raises(UserError, match=f"here, column 'margin': expected {found}"):
        check_row({"prompt": "q", "chosen": "y", "rejected": "n", "margin": margin}, "preference", "here")
