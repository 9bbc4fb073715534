from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lit_rlhf.data.reader import Options
from lit_rlhf.data.report import Report
from lit_rlhf.data.tokenize import (
    EMPTY,
    KEPT,
    LONG_PROMPT,
    NO_PROMPT,
    NO_RESPONSE,
    TIE,
    TOO_LONG,
    TRUNCATED,
    tokenize_preference,
    tokenize_prompts,
    tokenize_sft,
    tokenize_unpaired,
)
from lit_rlhf.errors import UserError
from tests.tiny_tokenizers import CHATML, MARKED_CHATML, byte_tokenizer, word_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
FREE = Options(max_length=None)
EOS = 1


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def sft(rows, tokenizer, options=FREE):
    columns = tokenize_sft(rows, tokenizer, options)
    return list(zip(columns["input_ids"], columns["loss_mask"], columns["status"], strict=True))


def preference(row, tokenizer, options=FREE):
    columns = tokenize_preference([{"margin": 0.0, **row}], tokenizer, options)
    return [columns[name][0] for name in ("prompt_ids", "chosen_ids", "rejected_ids", "status")]


def test_a_completion_by_itself_is_read_as_in_a_pair_and_the_side_that_is_lacking_has_no_token():
    tokenizer = word_tokenizer("a b c")
    pair = {"prompt": "a b", "chosen": " c a", "rejected": " b"}
    expected = preference(pair, tokenizer)
    rows = [pair, {"prompt": "a b", "chosen": " c a"}, {"prompt": "a b", "rejected": " b"}]
    columns = tokenize_unpaired(rows, tokenizer, FREE)
    assert "margin" not in columns and columns["status"] == [KEPT] * 3
    found = [[columns[name][i].tolist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for i in range(3)]
    prompt, chosen, rejected = (ids.tolist() for ids in expected[:3])
    assert found == [[prompt, chosen, rejected], [prompt, chosen, []], [prompt, [], rejected]]
    assert [mask.tolist() for mask in columns["chosen_mask"]] == [[True] * 3, [True] * 3, []]


def test_a_completion_by_itself_is_cut_or_dropped_as_one_of_a_pair_is():
    tokenizer, row = word_tokenizer("a b c"), {"prompt": "a b", "rejected": " c a c a"}
    cut = tokenize_unpaired([row], tokenizer, Options(max_length=4))
    assert cut["status"] == [TRUNCATED] and len(cut["rejected_ids"][0]) == 2
    dropped = tokenize_unpaired([row], tokenizer, Options(max_length=4, truncation="drop"))
    assert dropped["status"] == [TOO_LONG] and len(dropped["rejected_ids"][0]) == len(dropped["prompt_ids"][0]) == 0
    long_prompt = tokenize_unpaired([row], tokenizer, Options(max_length=2))
    assert long_prompt["status"] == [LONG_PROMPT]


def learnt(tokenizer, ids, mask):
    """The text that the loss sees, a bar between stretches."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return "|".join(tokenizer.decode(ids[a:b]) for a, b in edges.reshape(-1, 2))


def test_sft_masks_mark_the_completion_and_its_end_token():
    tokenizer = word_tokenizer("a b c", bos=True)  # a 4, " a" 5, b 6, " b" 7, c 8, " c" 9
    rows = [
        {"prompt": "a b", "completion": " c a"},
        {"prompt": "a", "completion": ""},
        {"text": "a b c"},
        {"prompt": "", "completion": "a b"},
    ]
    expected = [
        # <bos> a " b" " c" " a" <eos>
        ([2, 4, 7, 9, 5, 1], [0, 0, 0, 1, 1, 1]),
        # <bos> a <eos>: an empty completion teaches to stop
        ([2, 4, 1], [0, 0, 1]),
        # <bos> a " b" " c" <eos>: all but the first, which nothing predicts
        ([2, 4, 7, 9, 1], [0, 1, 1, 1, 1]),
        # <bos> a " b" <eos>
        ([2, 4, 7, 1], [0, 1, 1, 1]),
    ]
    for (ids, mask, status), (expected_ids, expected_mask) in zip(sft(rows, tokenizer), expected, strict=True):
        assert (ids.tolist(), mask.astype(int).tolist()) == (expected_ids, expected_mask)
        assert status == (EMPTY if sum(expected_mask) == 1 else KEPT)


def test_a_token_across_the_boundary_belongs_to_the_response():
    tokenizer = word_tokenizer("very un happy unhappy")
    [(ids, mask, _)] = sft([{"prompt": "very un", "completion": "happy"}], tokenizer)
    whole = tokenizer("very unhappy")["input_ids"]
    assert ids.tolist() == [*whole, EOS]
    assert mask.tolist() == [False, True, True]


def test_the_end_token_is_not_written_twice():
    tokenizer = word_tokenizer("a b")
    [(ids, _, _)] = sft([{"prompt": "a", "completion": " b<eos>"}], tokenizer)
    assert ids.tolist().count(EOS) == 1


def test_a_truncated_row_loses_its_end_and_gets_no_end_token():
    tokenizer = word_tokenizer("a b c d")
    row = {"prompt": "a", "completion": " b c d"}
    [(whole, _, status)] = sft([row], tokenizer, Options(5, "truncate"))
    assert len(whole) == 5 and whole[-1] == EOS and status == KEPT
    [(cut, mask, status)] = sft([row], tokenizer, Options(3, "truncate"))
    assert cut.tolist() == whole[:3].tolist() and mask.tolist() == [False, True, True] and status == TRUNCATED
    assert sft([row], tokenizer, Options(4, "drop"))[0][2] == TOO_LONG
    assert sft([{"prompt": "a b c", "completion": " d"}], tokenizer, Options(3, "truncate"))[0][2] == LONG_PROMPT
    assert sft([{"prompt": "a", "completion": ""}], tokenizer, Options(3, "truncate"))[0][2] == EMPTY, "an end token"


def test_end_tokens_are_learnt_where_pad_is_eos():
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [(ids, mask, _)] = sft([{"prompt": "x", "completion": "y"}], tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and mask.tolist() == [False, True, True]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML], ids=["by_prefixes", "by_marks"])
def test_chat_masks_mark_assistant_turns_with_their_end_of_turn(template):
    tokenizer = byte_tokenizer(template)
    messages = [user("hi"), assistant(" yo "), user("more"), assistant("ünd so")]
    rows = [
        {"messages": messages},
        {"prompt": messages[:3], "completion": messages[3:]},
        {"messages": messages[:3]},
        {"messages": [user("hi"), assistant("")]},
    ]
    expected = [" yo <|im_end|>|ünd so<|im_end|>", "ünd so<|im_end|>", " yo <|im_end|>", "<|im_end|>"]
    for (ids, mask, status), text in zip(sft(rows, tokenizer), expected, strict=True):
        assert learnt(tokenizer, ids, mask) == text
        assert status == (EMPTY if text == "<|im_end|>" else KEPT)
        assert mask[-1], "nothing after the last response: the model never has to write it"


def test_loss_on_all_learns_every_token_but_the_first():
    tokenizer = byte_tokenizer(CHATML)
    [(ids, mask, _)] = sft([{"messages": [user("hi"), assistant("yo")]}], tokenizer, Options(None, loss_on="all"))
    assert not mask[0] and mask[1:].all()
    assert tokenizer.decode(ids).endswith("yo<|im_end|>")
    [(_, mask, _)] = sft([{"prompt": "a", "completion": "b"}], tokenizer, Options(None, loss_on="all"))
    assert mask.tolist() == [False, True, True]


def test_a_template_without_an_end_of_turn_gets_the_end_token_once():
    tokenizer = byte_tokenizer("{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    [(ids, mask, _)] = sft([{"messages": [user("q"), assistant("r"), user("q"), assistant("s")]}], tokenizer)
    assert tokenizer.decode(ids) == "user: q\nassistant: r\nuser: q\nassistant: s\n<eos>"
    # Without a generation prompt in the template, the role is part of what the model has to write.
    assert learnt(tokenizer, ids, mask) == "assistant: r\n|assistant: s\n<eos>"


def test_marks_that_leave_the_end_of_turn_out_still_teach_an_end():
    tokenizer = byte_tokenizer(MARKED_CHATML.replace("<|im_end|>", ""))
    [(ids, mask, _)] = sft([{"messages": [user("q"), assistant("r")]}], tokenizer)
    assert learnt(tokenizer, ids, mask) == "r<eos>"


def test_a_template_that_rewrites_earlier_turns_is_refused():
    strips = CHATML.replace("message.content", "(message.content if loop.last or message.role == 'user' else '')")
    tokenizer = byte_tokenizer(strips)
    turns = [user("q"), assistant("think"), user("q"), assistant("r")]
    with pytest.raises(UserError, match="message 1 differently when other messages follow"):
        sft([{"messages": turns}], tokenizer)
    [(ids, mask, _)] = sft([{"prompt": turns[:3], "completion": turns[3:]}], tokenizer)
    assert learnt(tokenizer, ids, mask) == "r<|im_end|>"


def test_messages_without_a_template_are_refused_by_name():
    with pytest.raises(UserError, match=r"no chat template.*embedded demo.*data\.predict"):
        sft([{"messages": [user("q"), assistant("r")]}], byte_tokenizer())


def test_a_pair_shares_the_tokens_that_lie_wholly_inside_the_prompt():
    tokenizer = word_tokenizer("very un happy unhappy kind unkind", bos=True)
    prompt, chosen, rejected, status = preference(
        {"prompt": "very un", "chosen": "happy", "rejected": "kind"}, tokenizer
    )
    # <bos> very | " unhappy" <eos>, and " unkind" <eos>: "un" is no token of either
    assert tokenizer.convert_ids_to_tokens(prompt.tolist()) == ["<bos>", "very"]
    assert tokenizer.convert_ids_to_tokens(chosen.tolist()) == [" unhappy", "<eos>"]
    assert tokenizer.convert_ids_to_tokens(rejected.tolist()) == [" unkind", "<eos>"]
    assert status == KEPT


def test_what_both_answers_begin_with_stays_in_the_answers():
    tokenizer = word_tokenizer("how so yes no it is")
    prompt, chosen, rejected, _ = preference(
        {"prompt": "how so", "chosen": " it is yes", "rejected": " it is no"}, tokenizer
    )
    assert (len(prompt), len(chosen), len(rejected)) == (2, 4, 4)


def test_a_pair_of_conversations_is_split_after_the_generation_prompt():
    tokenizer = byte_tokenizer(CHATML)
    row = {"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("")]}
    prompt, chosen, rejected, _ = preference(row, tokenizer)
    assert tokenizer.decode(prompt) == "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(chosen) == "good<|im_end|>"
    assert tokenizer.decode(rejected) == "<|im_end|>"


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ("how so yes it is", "how so no it is", "how so"),
        ("how so yes", "how so", "how"),  # each side keeps a token
        ("how yes", "how yes", None),  # a tie
        ("yes how", "no how", None),  # nothing shared, and no beginning-of-sequence token
    ],
)
def test_an_implicit_text_prompt_ends_at_a_token_boundary_of_both(chosen, rejected, shared):
    tokenizer = word_tokenizer("how so yes no it is")
    prompt, chosen_ids, rejected_ids, status = preference({"chosen": chosen, "rejected": rejected}, tokenizer)
    if shared is None:
        assert status in (TIE, NO_PROMPT)
    else:
        assert "".join(tokenizer.convert_ids_to_tokens(prompt.tolist())) == shared
        assert len(chosen_ids) > 1 and len(rejected_ids) > 1 and status == KEPT


def test_an_implicit_prompt_never_ends_inside_a_word():
    tokenizer = byte_tokenizer()
    prompt, chosen, rejected, _ = preference({"chosen": "say cats", "rejected": "say cars"}, tokenizer)
    assert tokenizer.decode(prompt) == "say "
    assert (tokenizer.decode(chosen), tokenizer.decode(rejected)) == ("cats<eos>", "cars<eos>")


def test_pairs_are_dropped_or_cut_for_a_reason_that_is_counted():
    tokenizer = word_tokenizer("a b c")
    row = {"prompt": "a", "chosen": " b b b", "rejected": " c"}  # 5 tokens with the end
    same = {"prompt": "a", "chosen": " b", "rejected": " b"}
    assert preference(row, tokenizer, Options(5))[3] == KEPT
    assert preference(row, tokenizer, Options(4, "drop"))[3] == TOO_LONG
    _, chosen, rejected, status = preference(row, tokenizer, Options(3, "truncate"))
    assert status == TRUNCATED and len(chosen) == 2 and EOS not in chosen and rejected[-1] == EOS
    assert preference(row, tokenizer, Options(1, "truncate"))[3] == LONG_PROMPT
    assert preference(same, tokenizer)[3] == TIE
    assert preference({"prompt": "", "chosen": "a", "rejected": "b"}, tokenizer)[3] == NO_PROMPT
    report = Report.of("pairs", np.array([KEPT, TRUNCATED, EMPTY, TIE, TIE, TOO_LONG]))
    assert (report.rows, report.kept, report.truncated, report.empty, sum(report.dropped.values())) == (6, 3, 1, 1, 3)
    assert str(report) == (
        "pairs: 6 rows, 3 used, 1 of them truncated, 1 of them with an empty response, 3 dropped (1 too long, "
        "2 ties: chosen equals rejected)"
    )


def test_an_empty_response_is_used_and_counted():
    tokenizer = word_tokenizer("a b")
    assert preference({"prompt": "a", "chosen": "", "rejected": " b"}, tokenizer)[3] == EMPTY
    assert preference({"prompt": "a", "chosen": " b", "rejected": " a"}, tokenizer)[3] == KEPT
    [(ids, mask, status)] = sft([{"prompt": "a", "completion": ""}], tokenizer)
    assert (ids[mask].tolist(), status) == ([EOS], EMPTY)
    assert sft([{"text": "a"}], tokenizer, Options(None, loss_on="all"))[0][2] == KEPT, "a text of one token"


def test_a_text_without_a_prompt_is_learnt_but_for_its_first_token_and_is_not_called_empty():
    tokenizer = word_tokenizer("a b", bos=False)
    opened = word_tokenizer("a b", bos=True)  # the beginning token predicts the first word
    for row in ({"prompt": "", "completion": "a"}, {"text": "a"}):
        (ids, mask, status), *_ = sft([row], tokenizer)
        assert (tokenizer.decode(ids[:1]), ids[1:].tolist(), mask.tolist(), status) == ("a", [EOS], [False, True], KEPT)
        (ids, mask, status), *_ = sft([row], opened)
        assert (mask.tolist(), status) == ([False, True, True], KEPT)
    assert sft([{"prompt": "", "completion": ""}], tokenizer)[0][2] == NO_RESPONSE
    assert sft([{"prompt": "", "completion": ""}], opened)[0][2] == EMPTY


def test_long_prompts_keep_their_end_and_the_beginning_token():
    tokenizer = word_tokenizer("a b c d", bos=True)
    cut = Options(None, max_prompt_length=3)
    [ids], [status], _ = tokenize_prompts([{"prompt": "a b c d"}], tokenizer, cut).values()
    assert tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<bos>", " c", " d"] and status == TRUNCATED
    [ids], [status], _ = tokenize_prompts([{"prompt": "a b"}], tokenizer, cut).values()
    assert len(ids) == 3 and status == KEPT and EOS not in ids
    chat = byte_tokenizer(CHATML)
    [ids], _, _ = tokenize_prompts([{"prompt": [user("q")]}], chat, FREE).values()
    assert chat.decode(ids).endswith("<|im_start|>assistant\n")


def test_an_end_token_that_the_tokenizer_adds_is_no_part_of_a_prompt():
    tokenizer = word_tokenizer("a b")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("$A <eos>", special_tokens=[("<eos>", EOS)])
    [ids], _, _ = tokenize_prompts([{"prompt": "a"}], tokenizer, FREE).values()
    assert EOS not in ids
    [(ids, mask, _)] = sft([{"prompt": "a", "completion": " b"}], tokenizer)
    assert ids.tolist().count(EOS) == 1 and mask.tolist() == [False, True, True]


BYTES = byte_tokenizer()
TEXT = st.text(alphabet="ab é🙂\n .", max_size=12)


@given(prompt=TEXT, first=TEXT, second=TEXT)
@example(prompt="", first=" ", second=" a")
def test_tokens_of_prompt_and_responses_are_those_of_the_whole_texts(prompt, first, second):
    tokenizer = BYTES
    ids, chosen, rejected, status = preference({"prompt": prompt, "chosen": first, "rejected": second}, tokenizer)
    if status in (KEPT, EMPTY):
        assert (status == EMPTY) == ("" in (first, second))
        for response, text in ((chosen, prompt + first), (rejected, prompt + second)):
            assert np.concatenate([ids, response]).tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        assert tokenizer.decode(ids) == prompt  # bytes: every boundary between characters is one of tokens
    else:
        assert first == second or not prompt


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data folder with real tokenizers")
@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/tinyllama", "models/stories260K"])
def test_real_tokenizers_keep_texts_whole(name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / name)
    row = {"prompt": "Once upon a time, there was a", "chosen": " radio.\n\n  Überall 🙂", "rejected": "\n\nfox "}
    prompt, chosen, rejected, _ = preference(row, tokenizer)
    for response, column in ((chosen, "chosen"), (rejected, "rejected")):
        whole = tokenizer(row["prompt"] + row[column])["input_ids"]
        assert np.concatenate([prompt, response]).tolist() == [*whole, tokenizer.eos_token_id]
    assert prompt.tolist() == tokenizer(row["prompt"])["input_ids"]
    [(ids, mask, _)] = sft([{"prompt": row["prompt"], "completion": row["chosen"]}], tokenizer)
    assert ids[mask].tolist() == chosen.tolist()
