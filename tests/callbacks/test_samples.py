"""Completions of held-out prompts over time: tables in TensorBoard, and a page beside the run."""

import json

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.callbacks.samples import SampleTable, cell, markdown
from lit_rlhf.rollout.play import GenerationSettings
from tests.ppo_runs import PROMPTS, make
from tests.stages import make_stage, make_trainer


def test_samples_are_logged_before_training_and_at_each_validation(folder, tmp_path, monkeypatch):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    logger = TensorBoardLogger(tmp_path)
    tables, pictures = [], []
    monkeypatch.setattr(logger.experiment, "add_text", lambda tag, text, step: tables.append((tag, text, step)))
    monkeypatch.setattr(
        logger.experiment, "add_image", lambda tag, picture, step, dataformats: pictures.append((tag, step))
    )
    module, data, trainer = make(
        folder,
        tmp_path,
        num_minibatches=1,
        ppo_epochs=1,
        data={"validation": str(tmp_path / "held_out.jsonl")},
        trainer={
            "max_epochs": 2,
            "num_sanity_val_steps": -1,
            "logger": logger,
            "callbacks": [SampleTable(num_prompts=3)],
        },
    )
    trainer.fit(module, data)
    assert [(tag, step) for tag, _, step in tables] == [("samples", 0), ("samples", 1), ("samples", 2)]
    assert pictures == [("samples/tokens", 0), ("samples/tokens", 1), ("samples/tokens", 2)]
    assert tables[2][1].count("| **before** ·") == tables[2][1].count("| **step 2** ·") == 3
    kept = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [one["step"] for one in kept] == [0, 1, 2] and all(len(one["samples"]) == 3 for one in kept)
    assert "<html" in (tmp_path / "samples.html").read_text()


def test_a_resumed_run_goes_on_with_the_page_and_another_begins_its_own(inputs, tmp_path):
    def fit(resumes, epochs):
        module, data = make_stage("sft", inputs)
        keeping = ModelCheckpoint(tmp_path / "kept", save_last=True, enable_version_counter=False)
        options = {"limit_val_batches": 1.0, "num_sanity_val_steps": -1, "enable_checkpointing": True}
        trainer = make_trainer(tmp_path, max_epochs=epochs, callbacks=[SampleTable(2), keeping], **options)
        trainer.fit(module, data, ckpt_path=tmp_path / "kept" / "last.ckpt" if resumes else None)
        return [json.loads(line)["step"] for line in (tmp_path / "samples.jsonl").read_text().splitlines()]

    first = fit(False, 1)
    resumed = fit(True, 2)
    assert len(first) == 2 and resumed[:2] == first and len(resumed) == 3
    assert fit(False, 1) == first


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_context_ends_the_completions_of_a_sample_table_and_not_the_run(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs, generation=GenerationSettings(max_new_tokens=64, temperature=0.0))
    trainer = make_trainer(
        tmp_path, max_epochs=1, limit_val_batches=None, callbacks=[SampleTable(2), HuggingFaceExport()]
    )
    trainer.fit(module, data)
    assert (tmp_path / "model").is_dir()
    rows = [sample.row for sample in module.samples(data.sample_prompts(2))]
    assert all(len((row["prompt"] + " " + row["completion"]).split()) <= 64 for row in rows)


def test_a_table_has_a_row_for_each_time_and_one_for_what_the_data_have():
    def at(step, completion, score):
        row = {"prompt": "a|b", "completion": completion, "finish_reason": "stop", "score": score}
        return {"step": step, "samples": [{"row": row | {"reference_completion": "c\nd"}}]}

    text = markdown([at(0, "one", 0.5), at(9, "two", 1.0), at(1000, "three", -1.0), at(2000, "four", 2.0)])
    number = "· finish&#95;reason&nbsp;stop · score&nbsp;"
    assert text.splitlines() == [
        "**1.** a&#124;b",
        "",
        "| |",
        "| --- |",
        f"| **before** {number}0&#46;50<br>one |",
        f"| **step 1,000** {number}&#45;1&#46;00<br>three |",
        f"| **step 2,000** {number}2&#46;00<br>four |",
        "| **data**<br>c<br>d |",
    ]


def test_text_in_a_table_is_neither_html_nor_markdown():
    assert cell("<script>&amp; **b** [x](y) `c`\nd") == (
        "&lt;script&gt;&amp;amp; &#42;&#42;b&#42;&#42; &#91;x&#93;&#40;y&#41; &#96;c&#96;<br>d"
    )


def test_a_row_stays_one_whatever_ends_a_line_in_the_text_of_an_untrained_model():
    assert cell("a\rb\r\nc\x85d\u2028e\x0bf") == "a<br>b<br>c<br>d<br>e<br>f"
