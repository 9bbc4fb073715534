import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torchmetrics.functional.classification import binary_calibration_error
from transformers import AutoModelForTokenClassification, AutoTokenizer

from lit_rlhf import LoRA, ProcessRewardModel, StepwiseDataModule, UserError
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.cli.export import export
from lit_rlhf.data.reader import Options
from lit_rlhf.data.steps import tokenize_scored_steps
from lit_rlhf.losses import process_reward_loss
from lit_rlhf.rollout.process_rewards import step_scores
from tests.cli.command_line import QUICK, predictions, run
from tests.stages import make_stage, make_trainer

SHARED = Path(__file__).parents[3] / "shared" / "data"


def fit(inputs, folder, trainer=None, **options):
    torch.manual_seed(0)  # the head is drawn at random
    module, data = make_stage("process_reward_model", inputs, **options)
    options = {"max_epochs": 2, "limit_val_batches": None, "callbacks": [HuggingFaceExport()], **(trainer or {})}
    trainer = make_trainer(folder, **options)
    trainer.fit(module, data)
    return module, data, trainer


def held_out(module, data):
    """Scores and labels of the judged steps."""
    with torch.no_grad():
        parts = [
            (module.process_reward_model(batch.packed, batch.step_nodes), batch.labels)
            for batch in data.rows_dataloader("val")
        ]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


def test_the_loss_of_a_step_of_the_whole_data_is_the_mean_over_its_judged_steps(inputs, tmp_path):
    module, data = make_stage("process_reward_model", inputs)
    data.setup("fit")
    batches = list(data.train_dataloader())
    assert len(batches) > 2
    expected = process_reward_loss(*held_out(module, data)).mean().item()
    trainer = make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=100)
    trainer.fit(module, data)
    assert trainer.global_step == 1
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected, rel=1e-5)


def test_it_learns_which_steps_are_wrong_and_says_how_well(inputs, tmp_path):
    module, data, trainer = fit(inputs, tmp_path, {"max_epochs": 20, "check_val_every_n_epoch": 20})
    (metrics,) = trainer.validate(module, data, verbose=False)
    scores, labels = held_out(module, data)
    assert metrics["val/accuracy"] > 0.9
    assert metrics["val/accuracy"] == pytest.approx(((scores > 0) == (labels > 0.5)).float().mean().item())
    assert metrics["val/right_steps"] == pytest.approx(labels.mean().item())
    assert {"val/f1", "val/error_f1", "val/first_error_f1", "val/confidence"} < metrics.keys()
    # Of max(p, 1 - p) against being right, in bins of a twentieth, as torchmetrics has it of probability and label.
    agrees, confidence = ((scores > 0) == (labels > 0.5)).int(), scores.abs().sigmoid()
    expected = binary_calibration_error(confidence, agrees, n_bins=20, norm="l1").item()
    assert metrics["val/calibration_error"] == pytest.approx(expected, abs=1e-5)


DRAWS_HEADS = Version(transformers.__version__) < Version("5.18")  # of adapters for tokens, anew


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # which PEFT reads
@pytest.mark.parametrize(
    ("lora", "by"),
    [
        (None, "transformers"),
        (LoRA(r=4), "peft"),
        pytest.param(LoRA(r=4), "transformers", marks=pytest.mark.skipif(DRAWS_HEADS, reason="transformers 5.17")),
    ],
)
def test_transformers_and_peft_give_the_scores_of_the_export_at_the_ends_of_steps(lora, by, inputs, tmp_path):
    module, data, _ = fit(inputs, tmp_path, lora=lora)
    start = tmp_path if by == "transformers" else inputs
    model = AutoModelForTokenClassification.from_pretrained(start / "model", num_labels=1).eval()
    model = PeftModel.from_pretrained(model, tmp_path / "model").eval() if by == "peft" else model
    again = ProcessRewardModel(str(tmp_path / "model"), fresh_head=False)
    assert again.step_separator == module.step_separator == "\n"
    held = "config.json" if lora is None else "score_bias.json"
    assert json.loads((tmp_path / "model" / held).read_text())["step_separator"] == "\n"
    for batch in data.rows_dataloader("val"):
        starts = [0, *(batch.packed.last_nodes + 1).tolist()]
        with torch.no_grad():
            own = module.process_reward_model.eval()(batch.packed, batch.step_nodes)
            loaded = again.process_reward_model.eval()(batch.packed, batch.step_nodes)
            rows = [model(batch.packed.input_ids[None, a:b]).logits[0, :, 0] for a, b in itertools.pairwise(starts)]
        torch.testing.assert_close(torch.cat(rows)[batch.step_nodes], own, atol=1e-5, rtol=0)
        torch.testing.assert_close(loaded, own, atol=1e-5, rtol=0)


def test_the_bias_of_a_head_that_an_adapter_brings_is_added(inputs, tmp_path):
    module, _, _ = fit(inputs, tmp_path, lora=LoRA(r=4))
    file = tmp_path / "model" / "adapter_model.safetensors"
    weights = load_file(file)
    learnt = weights["base_model.model.score.bias"]
    assert torch.equal(learnt, module.process_reward_model.model.score.bias) and learnt.any()
    save_file(weights | {"base_model.model.score.bias": learnt + 1.5}, file)
    rows = [np.array([5, 6])], [np.array([7, 8])], [np.array([1])]
    before = step_scores(module.process_reward_model.eval(), *rows)
    after = step_scores(ProcessRewardModel(str(tmp_path / "model")).process_reward_model.eval(), *rows)
    assert after[0] == pytest.approx(before[0] + 1.5, abs=1e-5)


def test_a_step_is_scored_by_what_stands_before_it_alone(inputs):
    module, _ = make_stage("process_reward_model", inputs)
    rows = [{"prompt": "w3 w4", "completions": ["w5 w6", "w7"][:count]} for count in (1, 2)]
    made = tokenize_scored_steps(rows, module.tokenizer, Options(None))
    short, long = step_scores(module.process_reward_model, made["prompt_ids"], made["response_ids"], made["step_ends"])
    assert len(short) == 1 and len(long) == 2
    assert long[0] == pytest.approx(short[0], abs=1e-6) and abs(long[1] - long[0]) > 1e-4


def test_a_checkpoint_is_exported_by_itself_as_its_run_did(inputs, tmp_path):
    _, _, trainer = fit(inputs, tmp_path)
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    export(str(tmp_path / "end.ckpt"), str(tmp_path / "again"))
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


def test_steps_that_ended_otherwise_in_training_are_not_judged(inputs, tmp_path):
    fit(inputs, tmp_path)
    module = ProcessRewardModel(str(tmp_path / "model"))
    source = str(inputs / "stepwise.jsonl")
    data = StepwiseDataModule(source, source, step_separator=" ;", tokenizer=module.tokenizer)
    with pytest.raises(UserError, match=r"data\.step_separator \(' ;'\) is not what stood behind .* \('\\n'\)"):
        make_trainer(tmp_path, limit_val_batches=None).validate(module, data, verbose=False)
    trainer = make_trainer(tmp_path / "other", max_epochs=1, callbacks=[HuggingFaceExport()])
    trainer.fit(module, data)  # but learning from others is allowed
    assert json.loads((tmp_path / "other" / "model" / "config.json").read_text())["step_separator"] == " ;"


def test_data_of_another_kind_are_refused(inputs, tmp_path):
    module, _ = make_stage("process_reward_model", inputs)
    _, pairs = make_stage("reward_model", inputs)
    with pytest.raises(UserError, match=r"learns from a StepwiseDataModule, not from a PreferenceDataModule; set data"):
        make_trainer(tmp_path, max_epochs=1).fit(module, pairs)


@pytest.mark.filterwarnings("ignore")
def test_predict_writes_a_score_of_each_step_as_transformers_has_it(inputs, tmp_path, monkeypatch):
    fit(inputs, tmp_path)
    config = Path("configs/process_reward_model.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "w3 w4", "completions": ["w5 w6", "w9"], "id": i} for i in range(2)]
    Path("steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"--model.policy={tmp_path / 'model'}", "--data.predict=steps.jsonl"]
    options += ["--trainer.default_root_dir=out", "--trainer.precision=32-true"]
    assert run("predict", "--config", config, *QUICK, *options) == 0
    model, tokenizer = (
        kind.from_pretrained(tmp_path / "model") for kind in (AutoModelForTokenClassification, AutoTokenizer)
    )
    with torch.no_grad():
        logits = model.eval()(tokenizer("w3 w4 w5 w6 w9", return_tensors="pt").input_ids).logits[0, :, 0]
    for row, written in zip(rows, predictions("out"), strict=True):
        assert written.pop("step_scores") == pytest.approx(logits[[3, 4]].sigmoid().tolist(), abs=1e-5)
        assert written == row


@pytest.mark.filterwarnings("ignore")
def test_a_head_just_drawn_judges_nothing(inputs, tmp_path, monkeypatch, capsys):
    config = Path("configs/process_reward_model.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    options = [f"--model.policy={inputs / 'model'}", f"--data.predict={inputs / 'stepwise.jsonl'}"]
    assert run("predict", "--config", config, *QUICK, *options, "--trainer.default_root_dir=out") == 2
    assert "holds no trained head of steps, so its scores would be random" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the labelled steps are not in {SHARED}")
def test_it_learns_from_labels_of_real_solutions(tmp_path):
    """Of a small model that has read stories alone: better than the share of right steps, and than chance at errors."""
    files = {name: str(SHARED / "math" / f"process_reward_{name}.jsonl.gz") for name in ("train", "test")}
    torch.manual_seed(0)
    module = ProcessRewardModel(str(SHARED / "models" / "stories260K"), learning_rate=1e-3)
    data = StepwiseDataModule(files["train"], files["test"], max_length=512, tokenizer=module.tokenizer)
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=None)
    with np.errstate(all="ignore"):
        trainer.fit(module, data)
    metrics = trainer.callback_metrics
    assert metrics["val/accuracy"] > metrics["val/right_steps"]
    assert metrics["val/error_f1"] > 0.3
