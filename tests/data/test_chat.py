import json

import pytest
from transformers import GenerationConfig

from lit_rlhf.data.chat import Renderer, set_template, stop_token_ids
from lit_rlhf.data.modules import SFTDataModule
from lit_rlhf.errors import UserError
from tests.chat_templates import QWEN3
from tests.data.small_rows import attach
from tests.tiny_tokenizers import CHATML, byte_tokenizer


def test_stop_ids_are_the_end_token_the_end_of_turn_and_the_generation_config():
    tokenizer = byte_tokenizer(CHATML)
    eos, end_of_turn = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_token_ids(tokenizer) == (eos, end_of_turn)
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=[7, eos])) == (eos, end_of_turn, 7)
    assert stop_token_ids(byte_tokenizer(), GenerationConfig(eos_token_id=9)) == (eos, 9)
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(UserError, match="no response ends"):
        stop_token_ids(bare)


USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
NAMED = {"rag": CHATML, "tools": "{{ messages[0].content }}"}


def test_a_tokenizer_of_several_templates_without_a_default_serves_text_and_names_them_for_messages():
    tokenizer = byte_tokenizer(NAMED)
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)
    with pytest.raises(
        UserError, match=r"chat templates \['rag', 'tools'\] and none is the default: set chat_template"
    ):
        Renderer(tokenizer)
    set_template(tokenizer, "tools", {})
    assert Renderer(tokenizer)([USER]) == "q"


def test_a_template_that_asks_for_more_than_a_question_and_an_answer_has_no_end_of_turn_to_find():
    asks = "{% if not documents %}{{ raise_exception('documents are needed') }}{% endif %}"
    tokenizer = byte_tokenizer(asks)
    assert stop_token_ids(tokenizer) == (tokenizer.eos_token_id,)


def test_a_template_is_read_from_a_file_without_the_mark_that_editors_begin_it_with(tmp_path):
    tokenizer = byte_tokenizer()
    (tmp_path / "chat.jinja").write_bytes(b"\xef\xbb\xbf" + CHATML.encode())
    for path in (str(tmp_path / "chat.jinja"), tmp_path / "chat.jinja"):
        tokenizer.chat_template = None
        set_template(tokenizer, path, {})
        assert tokenizer.chat_template == CHATML
    (tmp_path / "latin.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"chat_template: .*latin\.jinja cannot be read as UTF-8"):
        set_template(tokenizer, str(tmp_path / "latin.jinja"), {})
    (tmp_path / "empty.jinja").write_text(" \n")
    with pytest.raises(UserError, match=r"chat_template \(.*empty\.jinja\) must be a file that holds a Jinja template"):
        set_template(tokenizer, str(tmp_path / "empty.jinja"), {})
    with pytest.raises(UserError, match=r"^chat_template: the chat template is not valid Jinja"):
        set_template(tokenizer, "{% for", {})
    with pytest.raises(UserError, match=r"gone\.jinja is none\); name the file that holds it, such as the chat_"):
        set_template(tokenizer, str(tmp_path / "gone.jinja"), {})
    (tmp_path / "chat.jinja").rename(tmp_path / "chat_template.jinja")
    with pytest.raises(UserError, match=rf"name the file that holds it, {tmp_path}/chat_template\.jinja$"):
        set_template(tokenizer, str(tmp_path), {})


def test_a_template_that_is_no_jinja_is_refused_by_its_line():
    with pytest.raises(UserError, match=r"chat template is not valid Jinja: .* \(its line 2\)"):
        stop_token_ids(byte_tokenizer("{{ messages[0].content }}\n{% if x %"))


@pytest.mark.parametrize(
    "template", ["{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ messages[0].nope.nope }}", "{{ raise_exception('no') }}"]
)
def test_whatever_a_template_stumbles_over_is_one_error_with_the_roles(template):
    with pytest.raises(UserError, match=r"refuses a conversation of the roles \['user', 'assistant'\]: "):
        Renderer(byte_tokenizer(template))([USER, ASSISTANT])


def test_a_template_that_writes_without_measure_is_one_error(monkeypatch):
    loop = "{% for i in range(1000) %}{{ messages[0].content }}{% endfor %}"
    assert len(Renderer(byte_tokenizer(loop))([USER])) == 1000 * len(USER["content"])
    monkeypatch.setattr("lit_rlhf.data.chat.LONGEST", 999)
    with pytest.raises(
        UserError, match=r"writes \d+ characters of one conversation, more than the 999 .* look for a l"
    ):
        Renderer(byte_tokenizer(loop))([USER])


def test_a_template_whose_loops_write_nothing_without_end_is_one_error_and_so_is_its_row(monkeypatch, tmp_path):
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = byte_tokenizer(
        "{% if messages[0].content == 'long' %}"
        + loops
        + "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    monkeypatch.setattr("lit_rlhf.data.chat.SLOWEST", 0.2)
    assert Renderer(tokenizer)([USER]) == USER["content"]
    said = "the chat template had not written one conversation of 1 messages after 0.2 seconds: look for a loop"
    with pytest.raises(UserError, match=said):
        Renderer(tokenizer)([{"role": "user", "content": "long"}])
    rows = tmp_path / "rows.jsonl"
    turns = [[{"role": "user", "content": text}, ASSISTANT] for text in ("short", "long")]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: the chat template had not written"):
        attach(SFTDataModule(str(rows), None, tokenizer=tokenizer))
    with pytest.raises(UserError, match=r"^chat_template: .* had not written"):  # whatever the row
        set_template(tokenizer, loops, {})


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{% set x = [1] * 10**10 %}",
        "{{ '%10000000000d' % 1 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    ],
)
def test_a_template_that_asks_for_memory_without_measure_is_one_error(template, monkeypatch):
    monkeypatch.setattr("lit_rlhf.data.chat.LARGEST", 2**26)
    said = "the chat template asked for more than 64 MB for one conversation of 1 messages"
    with pytest.raises(UserError, match=said):
        Renderer(byte_tokenizer(template))([USER])
    with pytest.raises(UserError, match=r"^chat_template: .* asked for more than 64 MB"):  # whatever the row
        set_template(byte_tokenizer(), template, {})


@pytest.mark.parametrize("template", ["{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"])
def test_a_template_that_calls_itself_without_end_is_one_error(template):
    with pytest.raises(UserError, match="or the template calls itself without end"):
        Renderer(byte_tokenizer(template))([USER, ASSISTANT])
    with pytest.raises(UserError, match="no response ends"):  # and none when the end of a turn is looked for
        tokenizer = byte_tokenizer(template)
        tokenizer.eos_token = None
        stop_token_ids(tokenizer)


def test_what_the_template_would_ignore_is_refused_by_column_or_option():
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(UserError, match="column 'tools': the chat template has no place for tools"):
        Renderer(tokenizer, {"tools": [{"name": "f"}]})
    with pytest.raises(UserError, match="'chat_template_kwargs': the chat template does not read enable_thinking"):
        Renderer(tokenizer, {"chat_template_kwargs": {"enable_thinking": False}})
    with pytest.raises(UserError, match=r"^chat_template_kwargs: the chat template does not read thinking"):
        set_template(byte_tokenizer(QWEN3), None, {"enable_thinking": False, "thinking": True})
    with pytest.raises(UserError, match="no chat template"):
        set_template(byte_tokenizer(), None, {"enable_thinking": False})


def test_a_rows_arguments_come_before_those_of_all_rows():
    off, on = {"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": True}}
    tokenizer = byte_tokenizer(QWEN3)
    assert Renderer(tokenizer, None, off).prompt([USER]).endswith("</think>\n\n")
    assert Renderer(tokenizer, on, off).prompt([USER]).endswith("assistant\n")
    assert Renderer(tokenizer).prompt([USER]).endswith("assistant\n")


def test_the_weight_of_a_message_is_no_business_of_the_template():
    shows = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert "weight" not in Renderer(byte_tokenizer(shows))([USER, {**ASSISTANT, "weight": 0}])


def test_a_template_is_not_shown_whether_a_turn_is_learnt():
    tokenizer = byte_tokenizer("{% for name in messages[0] %}{{ name }} {% endfor %}")
    shown = Renderer(tokenizer)(
        [{"role": "assistant", "content": "a", "weight": 1, "train": 1, "loss": 1, "name": "b"}]
    )
    assert shown == "role content name "


CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("template", "written"),
    [
        ("{% for m in messages %}{{ m.role[0] + ':' + m['content'] + ';' }}{% endfor %}", "u:q;a:;"),
        ("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}", "u:q;a:;"),
        ("{% for m in messages %}{{ 'call' if m['content'] is none else m['content'] }};{% endfor %}", "q;call;"),
        ("{% for m in messages %}{{ m.content if m.content is not none else 'call' }};{% endfor %}", "q;call;"),
    ],
)
def test_a_turn_without_content_is_null_to_templates_that_ask_for_it_and_empty_to_others(template, written):
    assert Renderer(byte_tokenizer("{# tool_calls #}" + template))([USER, CALL]) == written


PLAIN = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


@pytest.mark.parametrize("said", [{"tool_calls": CALL["tool_calls"]}, {"reasoning_content": "hm"}, {"thinking": "hm"}])
def test_what_a_message_says_beside_its_content_is_read_by_the_template_or_refused(said):
    (name,) = said
    turn = {**ASSISTANT, **said}
    with pytest.raises(UserError, match=f"does not read `{name}` of a message"):
        Renderer(byte_tokenizer(PLAIN))([USER, turn])
    assert Renderer(byte_tokenizer(PLAIN))([USER, {**ASSISTANT, name: said[name][:0]}]), "nothing is said there"
    for reads in (PLAIN.replace("m.content", f"m.{name}"), "{% for m in messages %}{{ m | tojson }}{% endfor %}"):
        assert Renderer(byte_tokenizer(reads))([USER, turn])
