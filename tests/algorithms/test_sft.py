import json
import shutil

import numpy as np
import pytest
import torch

from lit_rlhf import SFT, SFTDataModule
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.rollout.play import GenerationSettings
from tests.stages import make_stage, make_trainer
from tests.tiny import EOS, plain_response_logprobs


def ids_of(text):
    return np.array([int(word[1:]) for word in text.split()])


def test_the_loss_is_the_mean_over_all_response_tokens_and_their_ends_and_no_prompt_token(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    rows = [json.loads(line) for line in (inputs / "sft.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logprobs = torch.cat(
            [
                plain_response_logprobs(
                    module.policy.model.eval(), ids_of(row["prompt"]), np.append(ids_of(row["completion"]), EOS)
                )
                for row in rows
            ]
        )
    (metrics,) = make_trainer(tmp_path, limit_val_batches=1.0).validate(module, data, verbose=False)
    assert metrics["val/loss"] == pytest.approx(-logprobs.mean().item(), rel=1e-4)


def test_a_few_demonstrations_are_learnt_by_heart(inputs, tmp_path):
    answers = {"w3 w4": "w9 w10 w11", "w4 w3": "w12", "w5": "w9 w13 w9 w13"}
    rows = [json.dumps({"prompt": prompt, "completion": " " + answer}) + "\n" for prompt, answer in answers.items()]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    module = SFT(str(inputs / "model"), learning_rate=1e-2, generation=GenerationSettings(8, temperature=0.0))
    data = SFTDataModule(str(tmp_path / "rows.jsonl"), None, tokenizer=module.tokenizer)
    trainer = make_trainer(tmp_path, max_epochs=40)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"] < 0.1
    written = module.predict_step(PromptBatch([ids_of(prompt) for prompt in answers], {}), 0)
    assert [row["completion"].split() for row in written] == [answer.split() for answer in answers.values()]
    assert {row["finish_reason"] for row in written} == {"stop"}


def test_from_scratch_the_weights_are_others_and_nothing_is_predicted_before_training(inputs):
    drawn, stored = (SFT(str(inputs / "model"), from_scratch=scratch) for scratch in (True, False))
    assert "random" in drawn.untrained and stored.untrained is None
    assert drawn.policy.model.config.hidden_size == stored.policy.model.config.hidden_size
    assert not torch.equal(drawn.policy.head.weight, stored.policy.head.weight)


@pytest.mark.filterwarnings("ignore")
def test_weights_that_a_run_from_scratch_does_without_are_told_at_its_start(inputs, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_rlhf.algorithms.sft.rank_zero_info", said.append)
    (tmp_path / "bare").mkdir()
    for file in (inputs / "model").iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "bare")
    for folder, scratch in ((inputs / "model", False), (tmp_path / "bare", True), (inputs / "model", True)):
        assert said == []
        module = SFT(str(folder), from_scratch=scratch)
        data = SFTDataModule(str(inputs / "sft.jsonl"), None, tokenizer=module.tokenizer)
        trainer = make_trainer(tmp_path, max_steps=1)
        trainer.fit(module, data)
    assert len(said) == 1 and str(inputs / "model") in said[0] and "set model.from_scratch: false" in said[0]

    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module = SFT(str(inputs / "model"), from_scratch=True)
    make_trainer(tmp_path, max_steps=2).fit(module, data, ckpt_path=tmp_path / "first.ckpt")
    assert len(said) == 1
