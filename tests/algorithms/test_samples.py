"""Samples: text by tokens that make up the whole, and what each stage knows of a token."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lit_rlhf.algorithms.samples import MOST_TOKENS, Sample, read_samples
from lit_rlhf.callbacks import SampleTable
from lit_rlhf.engine.packing import Example
from tests.stages import make_stage, make_trainer

ROLES = {"prompt": "user", "completion": "assistant", "chosen": "assistant", "rejected": "assistant"}


class Words:
    """A tokenizer that writes a space before each word but the first, as SentencePiece decodes."""

    def decode(self, ids, skip_special_tokens):
        return " ".join(f"w{i}" for i in ids)


def test_readings_are_dealt_to_their_responses_and_what_adds_up_is_in_the_row():
    examples = [Example(np.array([3]), (np.array([4, 5]),)), Example(np.array([6, 7]), (np.array([8]),))]
    readings = {"KL": torch.tensor([0.5, 1.0, 3.0]), "value": torch.tensor([1.0, 2.0, 4.0])}
    first, second = read_samples([{"prompt": "a"}, {"prompt": "b"}], examples, Words(), lambda _: readings, "cpu")
    assert first == Sample({"prompt": "a", "kl": 1.5}, [" w4", " w5"], {"KL": [0.5, 1.0], "value": [1.0, 2.0]})
    assert second.row["kl"] == 3.0 and second.readings["value"] == [4.0]


def test_long_responses_are_shown_in_part_and_counted_whole():
    examples = [Example(np.array([3]), (np.arange(2 * MOST_TOKENS),))]
    (sample,) = read_samples([{}], examples, Words(), lambda _: {"KL": torch.ones(2 * MOST_TOKENS)}, "cpu")
    assert len(sample.pieces) == len(sample.readings["KL"]) == MOST_TOKENS and sample.row["kl"] == 2 * MOST_TOKENS


@pytest.mark.parametrize(
    ("stage", "known"),
    [
        ("sft", {"log-prob"}),
        ("reward_model", {"score so far"}),
        ("dpo", {"implicit reward", "KL", "log-prob"}),
        ("ppo", {"KL", "advantage", "value"}),
    ],
)
def test_each_stage_reads_tokens_by_what_it_knows(stage, known, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    module.untrained = None
    make_trainer(tmp_path, limit_val_batches=1).validate(module, data, verbose=False)
    samples = module.samples(data.sample_prompts(2))
    for sample in samples:
        assert set(sample.readings) == known
        assert {len(values) for values in sample.readings.values()} == {len(sample.pieces)}
    if stage == "reward_model":  # the last token read is where the score is
        assert samples[0].readings["score so far"][-1] == pytest.approx(samples[0].row["score"], abs=1e-4)
    elif stage in ("dpo", "ppo"):  # before training, the policy is the reference
        assert samples[0].row["kl"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "process_reward_model", "dpo", "ppo"])
def test_samples_of_conversations_are_text_to_every_way_of_showing_them(stage, inputs, tmp_path):
    folder = tmp_path / "conversations"
    shutil.copytree(inputs, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    for file in folder.glob("*.jsonl"):
        rows = [
            {
                name: [{"role": ROLES[name], "content": value.strip()}] if name in ROLES else value
                for name, value in row.items()
            }
            for row in map(json.loads, file.read_text().splitlines())
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, data = make_stage(stage, folder)
    module.untrained = None
    table = SampleTable(2)
    trainer = make_trainer(tmp_path, limit_val_batches=1, callbacks=[table])
    trainer.validate(module, data, verbose=False)
    (now,) = table.seen
    assert len(now["samples"]) == 2
    for sample in now["samples"]:
        assert all(isinstance(sample["row"][name], str) for name in ("prompt", "completion"))
        assert sample["row"]["prompt"].startswith("w")
        known = sample["row"].get("reference_completion")
        assert known is None if stage in ("reward_model", "process_reward_model", "ppo") else known.startswith("w")
