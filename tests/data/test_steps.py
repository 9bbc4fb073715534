import json
import math

import numpy as np
import pytest
from tokenizers import Regex, normalizers

from lit_rlhf import StepwiseDataModule, UserError
from lit_rlhf.data.formats import check_row
from lit_rlhf.data.prompts import load_prompts
from lit_rlhf.data.reader import Options
from lit_rlhf.data.steps import encode_steps, fit_steps, tokenize_scored_steps, tokenize_stepwise
from lit_rlhf.data.tokenize import KEPT, LONG_PROMPT, LONG_STEP, NO_PROMPT, NO_RESPONSE, TOO_LONG, TRUNCATED
from tests.data.small_rows import attach, write
from tests.tiny_tokenizers import CHATML, byte_tokenizer, metaspace_tokenizer, word_tokenizer

ROW = {"prompt": "how so", "completions": ["very so", "no", "yes"], "labels": [True, 0.25, None]}
FREE = Options(max_length=None)


def columns(rows, tokenizer, options=FREE, tokenize=tokenize_stepwise):
    made = tokenize([check_row(row, "stepwise", "here") for row in rows], tokenizer, options)
    names = [name for name in ("prompt_ids", "response_ids", "step_ends", "labels", "status") if name in made]
    return [[np.asarray(made[name][i]).tolist() for name in names] for i in range(len(rows))]


def test_a_step_ends_with_its_separator_and_unjudged_steps_are_in_no_loss():
    tokenizer = word_tokenizer("how so very no yes ;", bos=True)
    [(prompt, response, ends, labels, status)] = columns([ROW], tokenizer, FREE._replace(step_separator=";"))

    def text(ids):
        return "".join(tokenizer.convert_ids_to_tokens(ids))

    assert text(prompt) == "<bos>how so"
    assert text(response) == "very so;no;yes;"
    assert [text(response[: end + 1]) for end in ends] == ["very so;", "very so;no;"]
    assert labels == [1.0, 0.25] and status == KEPT


@pytest.mark.parametrize("separator", ["", "\n", "\n\n", " ки\n"])
def test_the_text_is_the_joined_steps_and_each_step_ends_with_a_token(separator):
    tokenizer, steps = byte_tokenizer(), ["Eins, zwei", " drei.", "\nÄpfel", "x"]
    row = {"prompt": "Q: ", "completions": steps, "labels": [1, 1, 0, 0]}
    [(prompt, response, ends, _, _)] = columns([row], tokenizer, FREE._replace(step_separator=separator))
    text = "Q: "
    assert tokenizer.decode(prompt) == text
    for step, end in zip(steps, ends, strict=True):
        text += step + separator
        assert tokenizer.decode(prompt + response[: end + 1]) == text


def test_sentencepiece_writes_no_space_where_a_step_begins():
    tokenizer = metaspace_tokenizer("a b c")
    assert [tokenizer.convert_ids_to_tokens(ids) for ids in encode_steps(tokenizer, [" a b", " c"])] == [
        ["▁a", "▁b"],
        ["▁c"],
    ]


def test_a_prompt_of_messages_is_rendered_and_the_steps_follow_as_the_assistants_words():
    tokenizer = byte_tokenizer(CHATML)
    row = {"prompt": [{"role": "user", "content": "hi"}], "completions": ["one", "two"], "labels": [True, False]}
    [(prompt, response, *_)] = columns([row], tokenizer)
    assert tokenizer.decode(prompt + response) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\none\ntwo\n"


@pytest.mark.parametrize(("control", "count"), [("keep", 1), ("escape", len("<|im_end|>"))])
def test_control_tokens_of_a_step_are_read_as_asked(control, count):
    row = {"prompt": "hi", "completions": ["<|im_end|>"], "labels": [True]}
    [(_, response, ends, _, _)] = columns([row], byte_tokenizer(), FREE._replace(control_tokens=control))
    assert len(response) == count + 1 and ends == [count]
    with pytest.raises(UserError, match="the row spells out the control tokens"):
        columns([row], byte_tokenizer(), FREE._replace(control_tokens="refuse"))


@pytest.mark.parametrize(
    ("max_length", "truncation", "labels", "kept", "status"),
    [
        (11, "truncate", [1, 0], 2, KEPT),  # 3 of the prompt, 4 of each step
        (10, "truncate", [1, 0], 1, TRUNCATED),
        (10, "drop", [1, 0], 0, TOO_LONG),
        (6, "truncate", [1, 0], 0, LONG_STEP),
        (3, "truncate", [1, 0], 0, LONG_PROMPT),
        (10, "truncate", [None, 0], 0, NO_RESPONSE),  # the one that was judged is cut
        (99, "truncate", [None, None], 0, NO_RESPONSE),
    ],
)
def test_what_is_too_long_loses_whole_steps(max_length, truncation, labels, kept, status):
    row = {"prompt": "abc", "completions": ["xyz", "uvw"], "labels": labels}
    [made] = columns([row], byte_tokenizer(), Options(max_length, truncation))
    assert made[-1] == status
    assert len(made[1]) == 4 * kept and len(made[2]) == len(made[3]) == kept


def test_a_row_without_a_prompt_is_dropped():
    [made] = columns([{"prompt": "", "completions": ["a"], "labels": [1]}], byte_tokenizer())
    assert made == [[], [], [], [], NO_PROMPT]


def test_fit_steps_keeps_those_that_end_within_the_room():
    steps = [np.array([5, 6]), np.array([7]), np.array([8, 9])]
    ids, ends = fit_steps(steps, 4)
    assert ids.tolist() == [5, 6, 7] and ends.tolist() == [1, 2]
    assert fit_steps(steps, None)[1].tolist() == [1, 2, 4]
    assert len(fit_steps(steps, 0)[0]) == len(fit_steps(steps, 0)[1]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [True]}, "column 'labels': 1 labels for 3 steps in 'completions': give each step one, null where"),
        ({"labels": "good"}, "column 'labels': expected a list of labels, one of each step, found text"),
        ({"labels": [1, 10**400, 0]}, "column 'labels', step 1: expected true or false, .* found 10000"),
        ({"labels": [1, 2, 0]}, "column 'labels', step 1: expected true or false, .* found 2"),
        ({"labels": [1, "+", 0]}, r"column 'labels', step 1: .* found text '\+'"),
        ({"labels": [1, math.nan, 0]}, "column 'labels', step 1: .* found nan"),
        ({"labels": None}, "expected the columns `prompt`, `completions` .* and null in \\['labels'\\]"),
        ({"completions": "one"}, "column 'completions': expected a list of steps, each a text, found text"),
        ({"completions": []}, "column 'completions': .* found an empty list"),
        ({"completions": ["a", "b\nc", "d"]}, r"column 'completions', step 1: it holds step_separator \('\\n'\)"),
        ({"completions": ["a", "b", "d\n"]}, r"column 'completions', step 2: .* or take it out of the step"),
        ({"tools": [{"name": "f"}]}, "column 'tools': it goes to the chat template, which renders messages"),
        ({"chat_template_kwargs": {"a": 1}}, "column 'chat_template_kwargs': it goes to the chat template"),
        ({"completions": ["a", " \n", "b"]}, "column 'completions', step 1: expected a text, found empty text; leave"),
        ({"completions": ["a", 3, "b"]}, r"column 'completions', step 1: expected a text, found int \(3\)"),
    ],
)
def test_rows_that_are_no_solutions_are_one_line_with_file_and_row(change, message, tmp_path):
    file = write(tmp_path / "steps.jsonl", [ROW, {**ROW, **change}])
    module = StepwiseDataModule(file, None, tokenizer=byte_tokenizer())
    with pytest.raises(UserError, match=rf"steps\.jsonl, line 2(: |, ){message}") as caught:
        attach(module)
    assert "\n" not in str(caught.value)


def test_a_step_without_a_token_is_refused_with_its_place(tmp_path):
    file = write(tmp_path / "steps.jsonl", [{"prompt": "a", "completions": ["a", "\u200b"], "labels": [1, 0]}])
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("[\u200b\u200c]"), "")
    module = StepwiseDataModule(file, None, step_separator="\u200c", tokenizer=tokenizer)
    with pytest.raises(UserError, match="line 1: column 'completions', step 1: the tokenizer makes no token of it"):
        attach(module)


def test_columns_may_have_other_names(tmp_path):
    file = write(tmp_path / "steps.jsonl", [{"q": "a", "steps": ["b", "c"], "ok": [True, False]}])
    names = {"prompt": "q", "completions": "steps", "labels": "ok"}
    module = attach(StepwiseDataModule(file, None, columns=names, tokenizer=byte_tokenizer()))
    [batch] = module.train_dataloader()
    assert batch.labels.tolist() == [1.0, 0.0]


def test_a_batch_says_where_in_the_packed_row_each_judged_step_ends(tmp_path):
    rows = [
        {"prompt": "ab" * (i + 1), "completions": ["c" * (i + 1), "d", "e"], "labels": [0.5, None, i % 2]}
        for i in range(5)
    ]
    tokenizer = byte_tokenizer()
    options = {"max_tokens": 40, "shuffle": False, "tokenizer": tokenizer}
    module = attach(StepwiseDataModule(write(tmp_path / "steps.jsonl", rows), None, step_separator=";", **options))
    batches, seen = list(module.train_dataloader()), []
    assert len(batches) > 1
    for batch in batches:
        ids, first = batch.packed.input_ids, 0
        for last, solution in zip(batch.packed.last_nodes.tolist(), range(batch.packed.num_sequences), strict=True):
            own = batch.solution_ids == solution
            texts = [tokenizer.decode(ids[first : node + 1]) for node in batch.step_nodes[own].tolist()]
            seen += list(zip(texts, batch.labels[own].tolist(), strict=True))
            first = last + 1
    expected = []
    for i in range(5):
        prompt, step = "ab" * (i + 1), "c" * (i + 1)
        expected += [(f"{prompt}{step};", 0.5), (f"{prompt}{step};d;e;", float(i % 2))]
    assert sorted(seen) == sorted(expected)
    assert sum(batch.denominator.item() for batch in batches) == pytest.approx(10)


def test_solutions_to_be_scored_keep_the_columns_of_their_rows(tmp_path):
    rows = [{"prompt": "abc", "completions": ["xyz", "uvw"], "id": 7}]
    file = write(tmp_path / "steps.jsonl", rows)
    with pytest.warns(UserWarning, match="1 of them truncated"):
        prompts = load_prompts(file, "predict", byte_tokenizer(), Options(10), kind="scored_steps")
    batch = prompts.take(np.array([0]))
    assert [ends.tolist() for ends in batch.step_ends] == [[3]]  # the second step is beyond max_length
    assert batch.columns == {"prompt": ["abc"], "completions": [["xyz", "uvw"]], "id": [7]}
    cut = tokenize_scored_steps(rows, byte_tokenizer(), Options(max_length=6, max_prompt_length=2))
    assert [cut[name][0].tolist() for name in ("prompt_ids", "step_ends")] == [byte_tokenizer()("bc").input_ids, [3]]
    assert json.dumps(cut["status"]) == f"[{TRUNCATED}]"
    for max_length, status in ((3, LONG_PROMPT), (6, LONG_STEP)):  # 3 of the prompt, 4 of a step
        assert tokenize_scored_steps(rows, byte_tokenizer(), Options(max_length))["status"] == [status]


def test_a_step_to_be_scored_may_hold_the_separator_since_its_end_is_given():
    [row] = [{"prompt": "a", "completions": ["b\nc"]}]
    assert tokenize_scored_steps([row], byte_tokenizer(), FREE)["step_ends"][0].tolist() == [3]
