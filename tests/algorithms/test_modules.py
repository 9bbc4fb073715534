"""What holds for the LightningModules: first losses, splits of a batch, exports, rewards."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf import DPO, RewardModel, RewardModelReward, RolloutDataModule, TextReward, UserError
from lit_rlhf.callbacks.export import HuggingFaceExport, export
from lit_rlhf.callbacks.samples import SampleTable, markdown_table
from lit_rlhf.engine.sharding import full_state_dict, total_norm
from lit_rlhf.rollout.play import GenerationSettings
from tests.stages import make_stage, make_trainer
from tests.tiny import EOS, save_tiny, tiny_tokenizer


class Watch(Callback):
    """Keeps the losses of optimiser steps and the gradients of the first."""

    def __init__(self):
        self.losses, self.gradients, self.micro_batches = [], None, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.micro_batches += 1
        if "train/loss" in trainer.callback_metrics:  # not before the first optimiser step
            self.losses.append(trainer.callback_metrics["train/loss"].item())

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.gradients is None:
            self.gradients = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def watch(stage, inputs, folder, data=None, trainer=None, **options):
    watcher = Watch()
    module, datamodule = make_stage(stage, inputs, **options)
    for name, value in (data or {}).items():
        setattr(datamodule, name, value)
    make_trainer(folder, max_epochs=1, callbacks=[watcher], **(trainer or {})).fit(module, datamodule)
    return watcher


class ClippedNorms(Callback):
    def __init__(self):
        self.norms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(total_norm([p.grad for p in pl_module.parameters() if p.grad is not None]).item())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_gradients_are_clipped_in_every_precision(precision, inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    clipped = ClippedNorms()
    make_trainer(tmp_path, max_steps=2, precision=precision, gradient_clip_val=0.01, callbacks=[clipped]).fit(
        module, data
    )
    assert clipped.norms == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_a_stage_learns_and_is_exported_in_half_precision(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    before = {name: p.clone() for name, p in module.named_parameters()}
    callbacks, trainer = [HuggingFaceExport()], {"precision": "bf16-true", "max_epochs": 1, "limit_val_batches": 1.0}
    trainer = make_trainer(tmp_path, callbacks=callbacks, **trainer)
    trainer.fit(module, data)
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert any(not torch.equal(p.float(), before[name]) for name, p in module.named_parameters())
    assert {"train/loss", "val/loss"} < set(trainer.callback_metrics)
    assert all(value.isfinite() for value in trainer.callback_metrics.values())
    kind = AutoModelForSequenceClassification if stage == "reward_model" else AutoModelForCausalLM
    exported = kind.from_pretrained(tmp_path / "model", dtype="auto")
    assert exported.dtype == torch.bfloat16


@pytest.mark.parametrize("cache_reference", [False, True])
def test_dpo_starts_at_log_2(inputs, tmp_path, cache_reference):
    watcher = watch("dpo", inputs, tmp_path, cache_reference=cache_reference)
    assert watcher.losses[0] == pytest.approx(math.log(2), abs=1e-6)


def test_cached_and_live_reference_give_the_same_losses(inputs, tmp_path):
    live, cached = (watch("dpo", inputs, tmp_path, cache_reference=cache).losses for cache in (False, True))
    assert cached == pytest.approx(live, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "reward_model", "dpo"])
def test_gradients_and_logged_loss_do_not_depend_on_the_split_into_micro_batches(inputs, tmp_path, stage):
    torch.manual_seed(0)  # the reward model's head is drawn at random
    whole = watch(stage, inputs, tmp_path, {"max_tokens": None, "batch_size": 24})
    torch.manual_seed(0)
    split = watch(stage, inputs, tmp_path, {"max_tokens": None, "batch_size": 5}, {"accumulate_grad_batches": 5})
    assert whole.micro_batches == 1 and split.micro_batches == 5
    assert split.losses == pytest.approx(whole.losses)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(split.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_an_export_loads_in_transformers_and_a_failing_one_leaves_the_old_one(inputs, tmp_path, monkeypatch):
    module, _ = make_stage("sft", inputs)
    weights, target = full_state_dict(module.exportable()), tmp_path / "model"
    export(module, weights, target)
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.get_output_embeddings().weight, module.policy.head.weight)

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.tokenizer, "save_pretrained", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        export(module, weights, target)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    AutoModelForCausalLM.from_pretrained(target)


@pytest.mark.parametrize(
    "function",
    [
        lambda prompts, responses: [1.0] * len(responses),
        lambda prompts, responses, answer: [float(x == "yes") for x in answer],
        lambda prompts, responses, **columns: [float(len(columns) == 2)] * len(responses),
    ],
    ids=["no column", "one by name", "all"],
)
def test_a_reward_function_gets_the_columns_that_it_names(function):
    reward = TextReward(function)
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    ids = [np.array([5])]
    assert reward(ids, ids, answer=["yes"], prompt=["w5"]).tolist() == [1.0]


def test_a_reward_function_that_asks_for_a_column_that_is_not_there_hears_which_are():
    reward = TextReward(lambda prompts, responses, solution: [1.0])
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    ids = [np.array([5])]
    with pytest.raises(UserError, match=r"'solution'; it is called as .*\*\*columns\), columns \['answer'\]"):
        reward(ids, ids, answer=["yes"])
    with pytest.raises(UserError, match="a function of text becomes one as TextReward"):
        RolloutDataModule(lambda prompts, responses: [1.0])


def test_reward_model_scores_are_the_same_in_transformers_with_pad_equal_to_eos(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm", pad_is_eos=True)))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    reward = RewardModelReward(str(tmp_path / "rm"))
    reward.bind(tiny_tokenizer(pad_is_eos=True), torch.device("cpu"))
    prompts = [np.array([5, 6, 7]), np.array([8])]
    responses = [np.array([9, EOS]), np.array([10, 11, 12, 13, EOS])]
    scores = reward(prompts, responses)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    pad = model.config.pad_token_id
    assert pad != EOS
    with torch.no_grad():
        padded = model(torch.tensor([[5, 6, 7, 9, EOS, pad], [8, 10, 11, 12, 13, EOS]])).logits[:, 0]
    np.testing.assert_allclose(scores, padded.numpy(), rtol=1e-4, atol=1e-5)


def test_scores_do_not_depend_on_the_token_budget(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm")))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 40, rng.integers(1, 9)) for _ in range(7)]
    small, large = (
        RewardModelReward(str(tmp_path / "rm"), max_tokens=budget)(prompts, prompts[::-1]) for budget in (10, 10_000)
    )
    np.testing.assert_allclose(small, large, rtol=1e-4, atol=1e-5)


def test_a_reward_model_with_another_tokenizer_is_refused(tmp_path):
    module = RewardModel(str(save_tiny(tmp_path / "lm")))
    export(module, full_state_dict(module.exportable()), tmp_path / "rm")
    other = tiny_tokenizer()
    other.add_tokens(["extra"])
    with pytest.raises(UserError, match="was trained with another tokenizer than the policy"):
        RewardModelReward(str(tmp_path / "rm")).bind(other, torch.device("cpu"))


def test_a_text_reward_reads_text_without_special_tokens():
    reward = TextReward(lambda prompts, responses, topic: [len(r.split()) for r in responses])
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    assert reward([np.array([1, 5])], [np.array([6, 7, EOS])], topic=["any"]).tolist() == [2]


def test_dpo_refuses_a_beta_of_zero_and_a_cache_of_another_reference(inputs):
    model = str(inputs / "model")
    with pytest.raises(UserError, match=r"beta \(0.0\) must be more than 0"):
        DPO(model, beta=0.0)
    with pytest.raises(UserError, match="drop reference"):
        DPO(model, reference=model, cache_reference=True)


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
