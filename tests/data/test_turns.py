import json

import pytest

from lit_rlhf.data.chat import Renderer
from lit_rlhf.data.reader import Options
from lit_rlhf.data.tokenize import NO_RESPONSE, tokenize_preference, tokenize_prompts, tokenize_sft
from lit_rlhf.data.turns import joined
from lit_rlhf.errors import UserError
from tests.chat_templates import LLAMA3, MISTRAL, QWEN3, QWEN25, R1
from tests.tiny_tokenizers import CHATML, MARKED_CHATML, byte_tokenizer

FREE = Options(max_length=None)
ALL = Options(None, loss_on="all")
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}]}
RESULT = {"role": "tool", "content": "rain"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def tokenizer_with(template):
    tokenizer = byte_tokenizer(template)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    return tokenizer


def stretches(tokenizer, ids, mask):
    """The text of each stretch of tokens that are learnt."""
    found, before = [], False
    for token, learnt in zip(ids.tolist(), mask.tolist(), strict=True):
        if learnt:
            found[-1:] = [found[-1] + [token]] if before else [*found[-1:], [token]]
        before = learnt
    return [tokenizer.decode(tokens) for tokens in found]


def learnt(row, template, options=FREE):
    tokenizer = tokenizer_with(template)
    columns = tokenize_sft([row], tokenizer, options)
    return stretches(tokenizer, columns["input_ids"][0], columns["loss_mask"][0])


def pair(row, template, options=FREE):
    """Prompt, chosen and rejected as text, and what of chosen is learnt."""
    tokenizer = tokenizer_with(template)
    columns = tokenize_preference([{"margin": 0.0, **row}], tokenizer, options)
    texts = [tokenizer.decode(columns[name][0]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    return [*texts, stretches(tokenizer, columns["chosen_ids"][0], columns["chosen_mask"][0])]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, QWEN25, LLAMA3])
def test_a_conversation_that_the_assistant_opens_learns_its_words_alone(template):
    messages = [assistant("Hi"), user("A"), assistant("B")]
    assert learnt({"messages": messages}, template) == ["Hi<|im_end|>", "B<|im_end|>"]
    assert learnt({"messages": messages[:1]}, template) == ["Hi<|im_end|>"]
    assert learnt({"messages": [{"role": "system", "content": "S"}, *messages]}, template)[0] == "Hi<|im_end|>"


def test_an_opening_that_calls_a_tool_is_learnt_without_its_header():
    row = {"messages": [CALL, RESULT, assistant("wet")], "tools": [{"name": "weather"}]}
    call = '<tool_call>weather{"city": "Bern"}</tool_call><|im_end|>'
    assert learnt(row, QWEN25) == [call, "wet<|im_end|>"]


def test_an_opening_whose_words_the_template_drops_is_refused():
    with pytest.raises(UserError, match=r"leaves out the beginning of message 0.*weight: 0"):
        learnt({"messages": [assistant("<think>x</think>Hi"), user("A"), assistant("B")]}, R1)
    assert learnt({"messages": [assistant("x</think>Hi", weight=0), user("A")]}, R1) == []


@pytest.mark.parametrize("template", [CHATML, QWEN25, LLAMA3])
def test_of_turns_that_follow_each_other_each_is_learnt_without_its_header(template):
    messages = [user("A"), assistant("B"), assistant("C"), assistant("D", weight=0), assistant("E")]
    found = learnt({"messages": messages}, template)
    assert found == ["B<|im_end|>", "C<|im_end|>", "E<|im_end|>"]


def test_words_that_the_template_leaves_out_are_refused_rather_than_learnt_as_nothing():
    row = {"prompt": [user("A")], "completion": [assistant("B")]}
    header = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.text }}{{ eos_token }}{% endfor %}"  # text, where content is meant
    )
    for letter in ("a", "t"):  # stands in the header, which is no word of the message
        with pytest.raises(UserError, match="leaves out message 1, which is to be learnt"):
            learnt({"prompt": [user("A")], "completion": [assistant(letter)]}, header)
    for template in ("", "{{ messages[0].content }}", header):
        with pytest.raises(UserError, match="leaves out message 1, which is to be learnt"):
            learnt(row, template)
    assert learnt({**row, "completion": [assistant(" ")]}, CHATML) == [" <|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, QWEN25, LLAMA3])
@pytest.mark.parametrize("name", ["weight", "train", "loss"])
def test_turns_of_weight_zero_are_read_and_not_learnt(template, name):
    bad, good = assistant("BAD", **{name: 0}), assistant("D", **{name: 1})
    turns = [user("A"), bad, user("C"), good, user("E"), assistant("F")]
    assert learnt({"messages": turns}, template) == ["D<|im_end|>", "F<|im_end|>"]
    assert learnt({"prompt": turns[:1], "completion": turns[1:]}, template) == ["D<|im_end|>", "F<|im_end|>"]
    last = [user("A"), assistant("B"), user("C"), bad]
    assert learnt({"messages": last}, template) == ["B<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
def test_a_row_of_which_nothing_is_to_be_learnt_is_dropped_and_counted(template):
    row = {"messages": [user("A"), assistant("B", weight=0)]}
    assert tokenize_sft([row], tokenizer_with(template), FREE)["status"] == [NO_RESPONSE]


def test_where_every_token_is_learnt_a_turn_of_weight_zero_is_not():
    turns = [user("A"), assistant("BAD", weight=0), user("C"), assistant("D")]
    first, second = learnt({"messages": turns}, CHATML, ALL)
    assert first == "user\nA<|im_end|>\n<|im_start|>assistant\n"  # nothing predicts the first token
    assert second == "<|im_start|>user\nC<|im_end|>\n<|im_start|>assistant\nD<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [user("A") | {"weight": 1}, assistant("B")]},
            "message 0 of role 'user' has weight 1, but only the",
        ),
        (
            {"prompt": [user("A"), assistant("B", weight=1), user("C")], "completion": [assistant("D")]},
            "message 1 of role 'assistant' has weight 1, but a prompt is not learnt",
        ),
        ({"messages": [user("A") | {"train": 1}, assistant("B")]}, "message 0 of role 'user' has train 1, but only"),
    ],
)
def test_a_weight_that_asks_for_what_is_not_learnt_is_refused(row, message):
    with pytest.raises(UserError, match=message):
        learnt(row, CHATML)
    assert learnt(row, CHATML, ALL), "where all is learnt, it is"


def test_weights_of_what_is_compared_whole_are_refused():
    row = {"prompt": [user("A")], "chosen": [assistant("B", weight=0)], "rejected": [assistant("C")]}
    with pytest.raises(UserError, match="weight 0 stands in a response that is compared"):
        pair(row, CHATML)


def test_marks_that_turns_share_unequally_are_matched_by_what_each_message_adds():
    calls_apart = MARKED_CHATML.replace(
        "{% endgeneration %}", "{% endgeneration %}{% if message.more %}{% generation %}+{% endgeneration %}{% endif %}"
    )
    turns = [user("A"), assistant("B", more=True, weight=0), user("C"), assistant("D", more=True)]
    assert learnt({"messages": turns}, calls_apart) == ["D+<|im_end|>"]
    last_only = MARKED_CHATML.replace("== 'assistant' %}", "== 'assistant' and loop.last %}")
    with pytest.raises(UserError, match="marks of the chat template cannot be told apart by turns: message 3 adds 0"):
        learnt({"messages": [user("A"), assistant("B"), user("C"), assistant("D", weight=0)]}, last_only)


def test_reasoning_that_a_template_strips_from_earlier_turns_is_refused_unless_they_are_not_learnt():
    turns = [user("A"), assistant("<think>\nhm\n</think>\n\nB"), user("C"), assistant("<think>\nso\n</think>\n\nD")]
    last = "<think>\nso\n</think>\n\nD<|im_end|>"
    with pytest.raises(UserError, match=r"message 1 differently when other messages follow.*weight: 0"):
        learnt({"messages": turns}, QWEN3)
    turns[1] |= {"weight": 0}
    assert learnt({"messages": turns}, QWEN3) == [last]
    assert learnt({"prompt": turns[:3], "completion": turns[3:]}, QWEN3) == [last]
    pairs = {"prompt": turns[:1], "chosen": [turns[1] | {"weight": 1}, *turns[2:]], "rejected": [assistant("D")]}
    with pytest.raises(UserError, match=r"message 1 differently when other messages follow.*compare single answers$"):
        pair(pairs, QWEN3)
    apart = {"messages": [user("C"), assistant("D", reasoning_content="so")]}
    assert learnt(apart, QWEN3) == [last]


def test_an_answer_is_learnt_after_what_the_generation_prompt_will_say():
    row = {"messages": [user("A"), assistant("B")]}
    assert learnt(row, QWEN3) == ["<think>\n\n</think>\n\nB<|im_end|>"]
    off = Options(None, template_kwargs={"enable_thinking": False})
    assert learnt(row, QWEN3, off) == ["B<|im_end|>"]
    assert learnt(row | {"chat_template_kwargs": {"enable_thinking": True}}, QWEN3, off) == learnt(row, QWEN3)
    assert learnt(row, MISTRAL) == [" B<eos>"]


def test_a_generation_prompt_that_answers_do_not_begin_with_is_refused():
    message = r"renders the beginning of message 1 differently .* instead of '<think>"
    with pytest.raises(UserError, match=message):
        learnt({"messages": [user("A"), assistant("B")]}, R1)
    with pytest.raises(UserError, match=message):
        pair({"prompt": [user("A")], "chosen": [assistant("B")], "rejected": [assistant("C")]}, R1)


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML, LLAMA3])
def test_a_prompt_that_begins_the_answer_is_continued_in_every_format(template):
    prompt = [user("q"), assistant("So")]
    row = {"prompt": prompt, "completion": [assistant(" be it")], "margin": 0.0}
    row |= {"chosen": [assistant(" be it")], "rejected": [assistant(" what")]}
    tokenizer = tokenizer_with(template)
    [ids], *_ = tokenize_prompts([row], tokenizer, FREE).values()
    begun = tokenizer.decode(ids)
    assert begun.endswith("So") and "<|im_end|>" not in begun[begun.index("assistant") :]
    assert learnt(row, template) == [" be it<|im_end|>"]
    assert pair(row, template)[:3] == [begun, " be it<|im_end|>", " what<|im_end|>"]


def test_a_turn_without_words_cannot_be_continued():
    with pytest.raises(UserError, match="no text to go on with"):
        tokenize_prompts([{"prompt": [user("q"), CALL]}], tokenizer_with(QWEN25), FREE)


def test_a_template_that_writes_a_turn_whole_cannot_continue_it():
    hides = CHATML.replace("message.content", "(message.content if message.role == 'user' else 'x')")
    with pytest.raises(UserError, match="refuses a conversation of the roles"):
        tokenize_prompts([{"prompt": [user("q"), assistant("So")]}], tokenizer_with(hides), FREE)


@pytest.mark.parametrize("template", [QWEN25, QWEN25.replace("message.content + '<", "message.content ~ '<")])
def test_what_a_tool_answers_inside_a_response_is_read_and_not_learnt(template):
    chosen = [CALL, RESULT, assistant("wet")]
    row = {"prompt": [user("q")], "chosen": chosen, "rejected": [assistant("dry")], "tools": [{"name": "weather"}]}
    prompt, whole, rejected, own = pair(row, template)
    assert prompt.endswith("q<|im_end|>\n<|im_start|>assistant\n") and '{"name": "weather"}' in prompt
    call = '<tool_call>weather{"city": "Bern"}</tool_call><|im_end|>'
    between = "<|im_start|>user\n<tool_response>rain</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert whole == f"{call}\n{between}wet<|im_end|>"
    assert [stretch.strip() for stretch in own] == [call, "wet<|im_end|>"]
    assert rejected == "dry<|im_end|>"
    demonstrated = {"messages": [user("q"), *chosen], "tools": row["tools"]}
    assert [stretch.strip() for stretch in learnt(demonstrated, template)] == [call, "wet<|im_end|>"]


def test_tools_reach_the_template_as_objects_or_json_and_choose_the_template_for_tools():
    tool = {"name": "weather", "parameters": {}}
    shown = json.dumps(tool)
    render = Renderer(tokenizer_with(QWEN25), {"tools": [tool]})
    assert render([user("q")]) == f"<|im_start|>system\nYou help.\n# Tools\n{shown}<|im_end|>\n" + (
        "<|im_start|>user\nq<|im_end|>\n"
    )
    both = tokenizer_with({"default": CHATML, "tool_use": "{{ tools | length }} tools"})
    assert Renderer(both, {"tools": [tool]})([user("q")]) == "1 tools"
    assert Renderer(both)([user("q")]) == "<|im_start|>user\nq<|im_end|>\n"


def test_a_response_goes_on_with_the_turn_that_its_prompt_has_begun():
    assert joined([user("q")], [assistant("a")]) == [user("q"), assistant("a")]
    assert joined([user("q"), assistant("a")], [assistant("b"), RESULT]) == [user("q"), assistant("ab"), RESULT]
    assert joined([], [assistant("b")]) == [assistant("b")]
