import json

import pytest

from lit_rlhf.data.messages import check_template_kwargs, checked_messages, learns, require_no_media, template_columns
from lit_rlhf.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern", "unit": None}}}


def test_null_fields_of_messages_are_fields_that_are_not_there():
    # As Arrow writes them: every message has all fields that any message has.
    given = [
        {"role": "user", "content": "q", "name": None, "tool_calls": None, "weight": None},
        {"role": "assistant", "content": None, "name": None, "tool_calls": [CALL], "weight": 1.0},
    ]
    assert checked_messages(given, "here") == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "tool_calls": [CALL], "weight": 1},
    ]


def test_content_in_parts_is_their_text():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert checked_messages([{"role": "user", "content": parts}], "here")[0]["content"] == "one\ntwo"
    assert checked_messages([{"role": "user", "content": ["one"]}], "here")[0]["content"] == "one"


def test_tool_calls_may_be_json_and_reasoning_may_stand_alone():
    call = {"role": "assistant", "tool_calls": json.dumps([CALL])}
    assert checked_messages([call], "here")[0]["tool_calls"] == [CALL]
    thought = {"role": "assistant", "reasoning_content": "hm"}
    assert checked_messages([thought], "here") == [thought]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "assistant", "content": None, "tool_calls": []}, "expected text as `content`, found nothing"),
        ({"role": "assistant", "tool_calls": ["f"]}, "expected a list of objects as `tool_calls`, found a list"),
        ({"role": "assistant", "tool_calls": "[f"}, ", tool_calls: not valid JSON"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "found a part of type 'image_url'"),
        ({"role": "user", "content": [7]}, "as `content`, found int \\(7\\)"),
        ({"role": "assistant", "content": "a", "weight": 0.5}, "expected 0 or 1 as `weight`, .* found float \\(0.5\\)"),
        ({"role": "assistant", "content": "a", "weight": "0"}, "expected 0 or 1 as `weight`"),
        ({"role": None, "content": "a"}, 'expected {"role": "user"'),
        ({"role": "assistant", "content": "a", "train": "no"}, "expected 0 or 1 as `train`, .* found text"),
        ({"role": "assistant", "content": "a", "loss_scale": 0.5}, "expected 0 or 1 as `loss_scale`"),
        ({"role": "assistant", "content": "a", "weight": 1, "loss": False}, "`weight` and `loss` say different things"),
        ({"role": "assistant", "content": "a", "train_detail": [{"begin_offset": 0}]}, "`train_detail` is not read"),
        ({"role": "user", "content": [{"text": "a", "train": False}]}, "`train` stands in a part of `content`"),
        ({"role": "user", "content": "<image>q", "images": ["a.png"]}, "field 'images': found a list .* leave it out"),
    ],
)
def test_a_message_that_says_what_cannot_be_read_is_named(message, words):
    with pytest.raises(UserError, match=f"here, message 0.*{words}"):
        checked_messages([message], "here")


@pytest.mark.parametrize("name", ["weight", "train", "loss", "loss_weight", "loss_scale"])
@pytest.mark.parametrize("value", [False, 0, 0.0])
def test_whether_a_turn_is_learnt_may_be_said_by_the_names_of_other_programs(name, value):
    turn = {"role": "assistant", "content": "a"}
    left_out, learnt, silent = checked_messages([{**turn, name: value}, {**turn, name: True}, turn], "here")
    assert [learns(left_out), learns(learnt), learns(silent)] == [False, True, True]
    assert learns({**left_out, "role": "user"}, by_default=False) is learns(silent, by_default=False) is False


def test_pictures_and_sounds_are_refused_by_their_column_unless_there_are_none():
    for name in ("image", "images", "video", "videos", "audio", "audios"):
        for empty in (None, "", [], {}, [None], {"bytes": None, "path": ""}, "[]"):
            require_no_media({"text": "a", name: empty}, "here", "column")
        for filled in ("a.png", ["a.png"], [{"bytes": b"x", "path": None}]):
            with pytest.raises(UserError, match=f"here, column '{name}': found .* `columns: {{aside: {name}}}`"):
                require_no_media({name: filled}, "here", "column")


def test_tools_and_arguments_may_be_json_and_null_or_empty_ones_are_none():
    tool = {"name": "weather"}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        assert template_columns({"tools": tools}, "here") == {"tools": [tool]}
    for kwargs in ({"enable_thinking": False, "date": None}, '{"enable_thinking": false}'):
        found = template_columns({"chat_template_kwargs": kwargs}, "here")
        assert found == {"chat_template_kwargs": {"enable_thinking": False}}
    for nothing in (None, "", [], {}, "[]", "null", " "):
        assert template_columns({"tools": nothing, "chat_template_kwargs": nothing}, "here") == {}
    assert template_columns({"chat_template_kwargs": {"date": None}}, "here") == {}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"tools": {"name": "f"}}, "column 'tools': expected a list of objects, found an object"),
        ({"tools": [3]}, "column 'tools': expected a list of objects"),
        ({"tools": "[f"}, "column 'tools': not valid JSON"),
        ({"tools": "[" * 100_000}, "column 'tools': nested too deep"),
        ({"tools": "[" + "9" * 5000 + "]"}, "column 'tools': an integer of thousands of digits"),
        ({"chat_template_kwargs": {1: 2}}, "column 'chat_template_kwargs': the name of a variable is text, found 1"),
        ({"chat_template_kwargs": [1]}, "column 'chat_template_kwargs': expected an object, found a list"),
        ({"chat_template_kwargs": {"tools": []}}, "column 'chat_template_kwargs': tools cannot be set there"),
        (
            {"chat_template_kwargs": {"add_generation_prompt": True}},
            "column .chat_template_kwargs.: add_generation_prompt cannot be set",
        ),
    ],
)
def test_tools_and_arguments_of_another_shape_are_named(row, words):
    with pytest.raises(UserError, match=f"^here, {words}"):
        template_columns(row, "here")


def test_variables_that_are_not_the_templates_own_are_refused_as_an_option_too():
    check_template_kwargs({"enable_thinking": False}, "chat_template_kwargs")
    with pytest.raises(UserError, match=r"^chat_template_kwargs: messages cannot be set there"):
        check_template_kwargs({"messages": []}, "chat_template_kwargs")
