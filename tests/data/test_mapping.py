import pytest

from lit_rlhf.data.formats import check_row
from lit_rlhf.data.mapping import renamed, require_read, reshaped
from lit_rlhf.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "s"}
ASKED = [{"from": "human", "value": "q"}]


def test_columns_get_our_names_and_the_others_keep_theirs():
    row = {"question": "q", "answer": "a", "prompt": 7, "x": 1}
    assert renamed(row, {"prompt": "question", "completion": "answer"}, "sft", "here") == {
        "prompt": "q",
        "completion": "a",
        "x": 1,
    }
    assert renamed(
        {"prompt": "a", "completion": "q"}, {"prompt": "completion", "completion": "prompt"}, "sft", "here"
    ) == {
        "prompt": "q",
        "completion": "a",
    }
    assert renamed(["no", "object"], {"prompt": "question"}, "sft", "here") == ["no", "object"]


CHAT = {"messages": [user("m"), assistant("m")]}


@pytest.mark.parametrize(
    ("shape", "columns", "row"),
    [
        ("alpaca", {}, {"instruction": "q", "output": "a", **CHAT}),
        ("alpaca", {}, {"instruction": "q", "output": "a", "prompt": "p", "completion": "c", "text": "t", **CHAT}),
        ("alpaca", {"instruction": "ask"}, {"ask": "q", "output": "a", **CHAT}),
        ("sharegpt", {}, {"conversations": [*ASKED, {"from": "gpt", "value": "a"}], "prompt": "p", **CHAT}),
        (None, {"completion": "answer"}, {"prompt": "q", "answer": "a", "text": "t", **CHAT}),
        (None, {"messages": "talk"}, {"talk": [user("q"), assistant("a")], "prompt": "p", **CHAT}),
        (None, {"text": "body"}, {"body": "q a", "prompt": "p", "completion": "c", **CHAT}),
    ],
)
def test_a_demonstration_is_read_by_what_is_declared_and_not_by_columns_beside_it(shape, columns, row):
    read = check_row(reshaped(renamed(row, columns, "sft", "here"), "sft", shape, "here"), "sft", "here")
    said = [value if isinstance(value, str) else " ".join(m["content"] for m in value) for value in read.values()]
    assert " ".join(said) == "q a"


@pytest.mark.parametrize("kind", ["prompts", "scored"])
def test_a_prompt_keeps_every_column_whatever_is_declared(kind):
    row = {"instruction": "q", "output": "a", "text": "t", **CHAT}
    assert reshaped(renamed(row, {}, kind, "here"), kind, "alpaca", "here").items() >= row.items()
    row = {"question": "q", "completion": "a", "text": "t", **CHAT}
    assert renamed(row, {"prompt": "question"}, kind, "here").keys() == {"prompt", "completion", "text", "messages"}


def test_a_column_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(UserError, match=r"here: there is no column 'quest', .* 'prompt' from; found \['question'\]"):
        renamed({"question": "q"}, {"prompt": "quest"}, "sft", "here")


@pytest.mark.parametrize(
    ("kind", "shape", "columns"),
    [
        ("sft", None, {"text": "a", "completion": "b", "tools": "c"}),
        ("sft", None, {"other": "tools"}),  # puts it aside
        ("sft", None, {"other": "images"}),
        ("sft", "alpaca", {"instruction": "q", "output": "a"}),
        ("sft", "sharegpt", {"conversations": "c", "system": "s"}),
        ("preference", None, {"chosen": "a", "rejected": "b", "margin": "c"}),
        ("preference", "alpaca", {"instruction": "q", "chosen": "a"}),
        ("prompts", None, {"solution": "a", "prompt": "b"}),  # a reward's
        ("scored", None, {"mine": "a"}),  # stands beside the score
    ],
)
def test_names_that_rows_of_a_kind_are_read_by_may_be_given_to_their_columns(kind, shape, columns):
    require_read(columns, kind, shape)


@pytest.mark.parametrize(
    ("kind", "shape", "columns", "said"),
    [
        (
            "sft",
            None,
            {"texts": "a"},
            r"names 'a' as 'texts', which nothing reads; did you mean text\? .* messages, prom",
        ),
        ("sft", None, {"prompt": "q", "answer": "a"}, "names 'a' as 'answer', which nothing reads. Rows"),
        (
            "sft",
            None,
            {"chosen": "a"},
            "'chosen'.* read for messages, prompt, completion, text, tools, chat_template_kwargs$",
        ),
        ("sft", None, {"instruction": "a"}, "'instruction'"),
        ("sft", "alpaca", {"instructions": "a"}, r"did you mean instruction\? .*read for instruction, input, "),
        ("sft", "sharegpt", {"conversation": "a"}, r"did you mean conversations\?"),
        ("preference", None, {"margins": "a"}, r"did you mean margin\? .* prompt, chosen, rejected, margin, tools"),
    ],
)
def test_a_name_that_nothing_reads_is_refused_with_those_that_there_are(kind, shape, columns, said):
    with pytest.raises(UserError, match=said):
        require_read(columns, kind, shape)


@pytest.mark.parametrize(
    ("kind", "shape", "row", "expected"),
    [
        (
            "sft",
            "alpaca",
            {"instruction": "add", "input": "1 2", "output": "3"},
            {"prompt": [user("add\n\n1 2")], "completion": [assistant("3")]},
        ),
        (
            "sft",
            "alpaca",
            {"instruction": "go on", "input": "", "output": "3", "system": "s", "history": [["1?", "2"]]},
            {"prompt": [SYSTEM, user("1?"), assistant("2"), user("go on")], "completion": [assistant("3")]},
        ),
        (  # null where a column is left out, as Parquet has it
            "sft",
            "alpaca",
            {"instruction": "go", "input": None, "output": "3", "system": None, "history": None},
            {"prompt": [user("go")], "completion": [assistant("3")]},
        ),
        (
            "preference",
            "alpaca",
            {"instruction": "go", "chosen": "y", "rejected": "n", "output": "unused"},
            {"prompt": [user("go")], "chosen": [assistant("y")], "rejected": [assistant("n")], "margin": 0.0},
        ),
        (
            "sft",
            "sharegpt",
            {"conversations": [*ASKED, {"from": "gpt", "value": "a"}], "system": "s"},
            {"messages": [SYSTEM, user("q"), assistant("a")]},
        ),
        (
            "preference",
            "sharegpt",
            {"conversations": ASKED, "chosen": {"from": "gpt", "value": "y"}, "rejected": "n", "margin": 2},
            {"prompt": [user("q")], "chosen": [assistant("y")], "rejected": [assistant("n")], "margin": 2.0},
        ),
        (
            "scored",
            "sharegpt",
            {"conversations": [*ASKED, {"from": "gpt", "value": "a"}]},
            {"prompt": [user("q")], "completion": [assistant("a")]},
        ),
        ("prompts", "sharegpt", {"conversations": ASKED}, {"prompt": [user("q")]}),
        ("prompts", "alpaca", {"instruction": "go"}, {"prompt": [user("go")]}),
        ("sft", None, {"text": "t"}, {"text": "t"}),
    ],
)
def test_rows_of_other_shapes_become_messages(kind, shape, row, expected):
    checked = check_row(reshaped(row, kind, shape, "here"), kind, "here")
    assert {name: value for name, value in checked.items() if name in expected or name not in row} == expected


def test_what_stands_beside_the_words_of_a_turn_stays_there():
    row = {"conversations": [{"from": "gpt", "value": "a", "weight": 0}]}
    assert reshaped(row, "sft", "sharegpt", "here")["messages"] == [{**assistant("a"), "weight": 0}]


@pytest.mark.parametrize(
    ("shape", "row", "message"),
    [
        ("alpaca", {"prompt": "q"}, r"here: expected the column 'instruction' of format alpaca; found \['prompt'\]"),
        ("alpaca", {"instruction": 5, "output": "y"}, r"here, column 'instruction': expected text, found int \(5\)"),
        ("alpaca", {"instruction": "x", "output": ["y"]}, "here, column 'output': expected text, found a list"),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["q"]]},
            "column 'history': expected pairs .* found a list",
        ),
        (
            "alpaca",
            {"instruction": "x", "output": "y", "history": [["q", 1]]},
            "column 'history': expected text, found int",
        ),
        ("sharegpt", {"messages": []}, r"here: expected the column 'conversations' .* found \['messages'\]"),
        ("sharegpt", {"conversations": "x"}, "column 'conversations': expected a list of turns, found text"),
        (
            "sharegpt",
            {"conversations": [*ASKED, {"from": "alien", "value": "x"}]},
            "column 'conversations', turn 1: .* from being one of system, human, .*; found an object .*alien",
        ),
        ("sharegpt", {"conversations": [{"from": ["human"], "value": "x"}]}, "turn 0: expected"),
        ("sharegpt", {"conversations": [{"from": "human"}]}, "turn 0: expected"),
        (
            "alpaca",
            {"instruction": "x", "output": None},
            r"the column 'output' .* found \['instruction'\], and null in \['out",
        ),
        ("sharegpt", {"conversations": []}, "here, column 'conversations': the list of turns is empty"),
        (
            "sharegpt",
            {"conversations": [*ASKED, {"from": "gpt", "value": None}]},
            "here, column 'conversations', turn 1: expected text as `value`, found nothing",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": [{"type": "image"}]}]},
            "turn 0: .* as `value`, found a part of type 'image'",
        ),
    ],
)
def test_a_row_of_another_shape_than_declared_is_named_by_its_column(shape, row, message):
    with pytest.raises(UserError, match=message):
        reshaped(row, "sft", shape, "here")


@pytest.mark.parametrize(
    ("kind", "shape", "row", "message"),
    [
        (
            "preference",
            "alpaca",
            {"instruction": "x", "output": ["y", "n"]},
            r"'chosen' .* found \['instruction', 'output'\]$",
        ),
        (
            "preference",
            "sharegpt",
            {"conversations": ASKED, "chosen": "y"},
            r"'rejected' .* found \['chosen', 'conversations'\]$",
        ),
        ("scored", "alpaca", {"instruction": "x"}, r"'output' of format alpaca; found \['instruction'\]$"),
        ("scored", "sharegpt", {"conversations": ASKED}, "column 'conversations': expected an answer"),
        (
            "prompts",
            "sharegpt",
            {"conversations": [{"from": "gpt", "value": "a"}]},
            "'conversations': expected a turn before",
        ),
    ],
)
def test_what_a_row_of_another_shape_lacks_is_named_by_columns_of_its_file(kind, shape, row, message):
    with pytest.raises(UserError, match=message):
        check_row(reshaped(row, kind, shape, "here"), kind, "here")
