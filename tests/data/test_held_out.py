"""Shares of training rows that are held out: about as many as asked, whole prompts, the same everywhere."""

import json

import numpy as np
import pytest

from lit_rlhf import DPO, PreferenceDataModule, RolloutDataModule, SFTDataModule, UserError
from lit_rlhf.data.held_out import Side, share_of
from lit_rlhf.data.naming import Source
from lit_rlhf.data.overview import overview
from tests.stages import make_trainer
from tests.tiny import tiny_tokenizer


def rows_of(prompts, answers=1):
    return [
        {"prompt": f"w{3 + prompt % 20} w{3 + prompt // 20}", "chosen": f" w{5 + answer}", "rejected": " w9 w8"}
        for answer in range(answers)
        for prompt in range(prompts)
    ]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def score(prompts, responses):
    return [0.0] * len(prompts)


def pairs(file, validation, **options):
    data = PreferenceDataModule(file, validation, tokenizer=tiny_tokenizer(), **options)
    data.setup("fit")
    return data.datasets


def test_both_sides_are_all_rows_and_share_no_prompt(tmp_path):
    found = pairs(write(tmp_path / "rows.jsonl", rows_of(200, answers=3)), 0.2)
    train, held_out = found["train"], found["validation"]
    assert len(train) + len(held_out) == 600 and 0.12 < len(held_out) / 600 < 0.28
    assert not set(train.prompts()) & set(held_out.prompts()) and len(held_out) % 3 == 0
    _, contents = overview(train, train.reports)
    assert overview(held_out, held_out.reports, train=contents)[0].prompts_in_train == 0


def test_the_share_is_that_of_many_rows():
    side = Side(0.05, True)
    count = sum(side.has({"prompt": f"question {number}", "answer": "x"}, "row") for number in range(20_000))
    assert abs(count / 20_000 - 0.05) < 4 * (0.05 * 0.95 / 20_000) ** 0.5


def test_a_row_stays_on_its_side_as_others_come_and_in_every_source(tmp_path):
    few = pairs(write(tmp_path / "few.jsonl", rows_of(60)), 0.25)["validation"]
    more = [write(tmp_path / f"{name}.jsonl", rows_of(count)) for name, count in (("more", 90), ("again", 60))]
    many = pairs(more, 0.25)["validation"]
    assert set(few.prompts()) < set(many.prompts())
    assert not set(many.prompts()) & set(pairs(more, 0.25)["train"].prompts())


def test_the_weight_of_a_source_is_that_of_its_training_rows(tmp_path):
    file = write(tmp_path / "rows.jsonl", rows_of(100))
    once, twice = pairs(file, 0.2), pairs({file: 2.0}, 0.2)
    assert len(twice["train"]) == 2 * len(once["train"]) and len(twice["validation"]) == len(once["validation"])


def test_a_row_is_named_by_its_line_in_the_whole_file(tmp_path):
    rows = rows_of(40)
    file = write(tmp_path / "rows.jsonl", rows)
    for split in pairs(file, 0.3).values():
        lines = [int(split.place(number).rpartition(" ")[2]) for number in range(len(split))]
        assert [rows[line - 1]["prompt"] for line in lines] and lines == sorted(set(lines))
        firsts = [split.table[[row]]["prompt_ids"][0].as_py() for row in split.rows.tolist()]
        tokenizer = tiny_tokenizer()
        assert [tokenizer(rows[line - 1]["prompt"])["input_ids"] for line in lines] == firsts


def test_demonstrations_and_prompts_are_split_alike(tmp_path):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    talks = [{"messages": [turns[0] | {"content": f"w{3 + n % 20} w{3 + n // 20}"}, turns[1]]} for n in range(90)]
    prompts = [{"prompt": talk["messages"][:1], "messages": "a column of the user's"} for talk in talks]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + ' </s> ' }}{% endfor %}"
    sft = SFTDataModule(write(tmp_path / "sft.jsonl", talks), 0.3, tokenizer=tokenizer)
    file = write(tmp_path / "prompts.jsonl", prompts)
    rollout = RolloutDataModule(score, file, 0.3, max_new_tokens=8, tokenizer=tokenizer)
    for data in (sft, rollout):
        data.setup("fit")
    held_out = [len(sft.datasets["validation"]), len(rollout.prompts["validation"].prompt_ids)]
    assert held_out[0] == held_out[1] > 0
    shown = sft.sample_prompts(99)
    assert len(shown.prompt_ids) == held_out[0]
    for ours, theirs in zip(shown.prompt_ids, rollout.prompts["validation"].prompt_ids, strict=True):
        assert np.array_equal(ours, theirs)


def test_held_out_rows_are_validated_and_tested_on(inputs, tmp_path):
    module = DPO(str(inputs / "model"))
    data = PreferenceDataModule(str(inputs / "preference.jsonl"), 0.4, tokenizer=module.tokenizer)
    trainer = make_trainer(tmp_path, limit_val_batches=None, max_epochs=1)
    trainer.fit(module, data)
    (validated,), (tested,) = trainer.validate(module, data, verbose=False), trainer.test(module, data, verbose=False)
    assert validated["val/loss"] == pytest.approx(tested["test/loss"], rel=1e-6)


@pytest.mark.parametrize("given", [0, 1, 1.5, -0.1, 5, float("nan")])
def test_a_number_that_is_no_share_is_refused(given, tmp_path):
    with pytest.raises(UserError, match=r"data\.validation \(.*\) must be a share of the training rows, above 0 and"):
        SFTDataModule("rows.jsonl", given)


def test_a_share_without_training_rows_or_of_none_or_all_of_them_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"data\.validation \(0\.1\) is a share of data\.train, which is null"):
        SFTDataModule(None, 0.1)
    file = write(tmp_path / "rows.jsonl", rows_of(3))
    with pytest.raises(
        UserError,
        match=r"rows\.jsonl: data\.validation \(1e-09\) holds out none .* of one prompt stay together; raise it",
    ):
        pairs(file, 1e-9)
    with pytest.raises(UserError, match=r"data\.validation \(0\.999999\) holds out all of its rows, .*; lower it"):
        pairs(file, 0.999999)


def test_names_are_no_shares_and_a_share_is_told_of_its_source():
    assert share_of("0.5", "data.validation") is share_of(None, "data.validation") is share_of(True, "x") is None
    assert str(Source("a.jsonl", side=Side(0.05, True))) == "0.05 of a.jsonl"
    assert str(Source("a.jsonl", side=Side(0.05, False))) == str(Source("a.jsonl")) == "a.jsonl"
