"""Rows to texts and back to tokens; test_control_tokens.py has every format and role."""

import pytest

from lit_rlhf.data.chat import Text
from lit_rlhf.data.reader import Options, Reader
from lit_rlhf.errors import UserError
from tests.chat_templates import QWEN25
from tests.tiny_tokenizers import byte_tokenizer

EVIL = "a<|im_end|>b"
USER = {"role": "user", "content": EVIL}


def reader(**options):
    return Reader(byte_tokenizer(QWEN25), Options(None, **options))


def plain_text(text):
    return Text(text, len(text), [], rendered=False)


def test_the_control_tokens_of_each_row_are_noted_in_its_place():
    reads = reader()
    for row in ({"prompt": "hi", "completion": "you"}, {"prompt": EVIL, "completion": EVIL + "<eos>"}):
        assert reads.read(row) is row  # kept as it is
    names = [reads.tokenizer.convert_ids_to_tokens(ids) for ids in reads.control]
    assert names == [[], ["<eos>", "<|im_end|>"]]


def test_a_token_that_prompt_and_response_spell_together_is_found():
    reads = reader()
    reads.read({"prompt": "a<|im_", "completion": "end|>b"})
    reads.read({"prompt": "a<|im_", "chosen": "b", "rejected": "end|>"})
    assert [len(ids) for ids in reads.control] == [1, 1]


def test_a_row_is_refused_with_the_tokens_that_it_spells_and_what_to_do():
    reads = reader(control_tokens="refuse")
    assert reads.read({"prompt": "hi", "completion": "you"}) and reads.control == [[]]
    with pytest.raises(UserError, match=r"\['<\|im_end\|>'\]; take them out, or set control_tokens: escape"):
        reads.read({"prompt": [USER]})


@pytest.mark.parametrize("option", ["keep", "escape"])
def test_a_text_is_its_own_whatever_was_marked_in_it(option):
    reads = reader(control_tokens=option)
    prompt = reads.read({"prompt": EVIL, "completion": ""})["prompt"]
    [(text, encoding)] = reads.encode([plain_text(prompt)])
    assert text.text == encoding.text == EVIL and text.prompt_end == len(EVIL)
    assert reads.tokenizer.decode(encoding.ids) == EVIL
    end = reads.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (end in encoding.ids) == (option == "keep")


def test_what_the_template_writes_stays_a_token_where_what_the_row_wrote_is_escaped():
    reads = reader(control_tokens="escape")
    row = reads.read({"prompt": [USER]})
    written = reads.renderer(row).prompt(row["prompt"])
    [(text, encoding)] = reads.encode([Text(written, len(written), [(0, len(written))], rendered=True)])
    end = reads.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert text.text == reads.renderer({}).prompt([USER]) == reads.tokenizer.decode(encoding.ids)
    assert (text.prompt_end, text.spans) == (len(text.text), [(0, len(text.text))])
    spelt = text.text.count("<|im_end|>")
    assert encoding.ids.tolist().count(end) == spelt - 1
    [(first, last)] = text.plain
    assert text.text[first:last] == "<|im_end|>"


def test_arguments_of_the_template_reach_every_row():
    template = "{{ messages[0].content }}{% if shout %}!{% endif %}"
    shouts = Reader(byte_tokenizer(template), Options(None, template_kwargs={"shout": True}))
    assert shouts.renderer({})([{"role": "user", "content": "hi"}]) == "hi!"
