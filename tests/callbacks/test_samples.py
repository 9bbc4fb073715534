"""Completions of held-out prompts as tables in TensorBoard."""

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.callbacks.samples import SampleTable, markdown_table
from lit_rlhf.rollout.play import GenerationSettings
from tests.ppo_runs import PROMPTS, make
from tests.stages import make_stage, make_trainer


def test_samples_are_logged_at_each_validation(folder, tmp_path, monkeypatch):
    (tmp_path / "held_out.jsonl").write_text(PROMPTS + "\n")
    logger = TensorBoardLogger(tmp_path)
    tables = []
    monkeypatch.setattr(logger.experiment, "add_text", lambda tag, text, step: tables.append((tag, text, step)))
    module, data, trainer = make(
        folder,
        tmp_path,
        num_minibatches=1,
        ppo_epochs=1,
        data={"validation": str(tmp_path / "held_out.jsonl")},
        trainer={"max_epochs": 2, "logger": logger, "callbacks": [SampleTable(num_prompts=3)]},
    )
    trainer.fit(module, data)
    assert [(tag, step) for tag, _, step in tables] == [("samples", 1), ("samples", 2)]
    assert all(text.startswith("| prompt | completion |") and text.count("\n") == 4 for _, text, _ in tables)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_the_context_ends_the_completions_of_a_sample_table_and_not_the_run(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs, generation=GenerationSettings(max_new_tokens=64, temperature=0.0))
    trainer = make_trainer(
        tmp_path, max_epochs=1, limit_val_batches=None, callbacks=[SampleTable(2), HuggingFaceExport()]
    )
    trainer.fit(module, data)
    assert (tmp_path / "model").is_dir()
    rows = module.sample_table(data.sample_prompts(2))
    assert all(len((row["prompt"] + " " + row["completion"]).split()) <= 64 for row in rows)


def test_a_sample_table_is_one_line_per_row_whatever_the_text():
    row = {"prompt": "a|b", "completion": "c\nd", "finish_reason": "stop", "score": 0.5}
    assert markdown_table([row]).splitlines() == [
        "| prompt | completion | outcome |",
        "| --- | --- | --- |",
        r"| a\|b | c<br>d | finish_reason: stop<br>score: 0.50 |",
    ]
