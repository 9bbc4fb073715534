"""The model card that stands in every export."""

import re
from importlib.metadata import version

import pytest
import yaml
from huggingface_hub import ModelCard
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf import SFT, LoRA, RewardModel, UserError
from lit_rlhf.algorithms.checkpoint import read_facts
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.callbacks.export import export
from lit_rlhf.callbacks.model_card import base_model_of, card_facts, model_card, short, stored_facts
from tests.stages import make_stage, make_trainer


@pytest.fixture(scope="module")
def run(inputs, tmp_path_factory):
    """The folder of a DPO run with held-out rows, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    module, data = make_stage("dpo", inputs, beta=0.25)
    saver = ModelCheckpoint(dirpath=folder, filename="end")
    options = {"max_epochs": 1, "limit_val_batches": None, "enable_checkpointing": True}
    trainer = make_trainer(folder, callbacks=[saver, HuggingFaceExport()], **options)
    trainer.fit(module, data)
    return folder, trainer


@pytest.fixture(scope="module")
def card(run):
    return ModelCard.load(run[0] / "model" / "README.md")


def test_a_card_tells_method_start_data_metrics_config_and_versions(run, card, inputs):
    assert card.data["library_name"] == "transformers" and card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["lit-rlhf", "dpo"]
    assert "# A policy by DPO" in card.text and f"{inputs.name}/model`, {run[1].global_step} steps" in card.text
    assert f"| train | .../{inputs.name}/preference.jsonl |" in card.text
    (settings,) = re.findall(r"```yaml\n(.*?)```", card.text, re.S)
    config = yaml.safe_load(settings)
    assert config["model"]["beta"] == 0.25 and config["data"]["max_tokens"] == 100
    assert config["trainer"] == {"precision": "32-true", "ranks": 1}
    assert f"torch {version('torch')}" in card.text
    told = dict(re.findall(r"\| (val/\S+) \| (\S+) \|", card.text))
    logged = {name: value for name, value in run[1].callback_metrics.items() if name.startswith("val/")}
    assert told == {name: f"{value:.4g}" for name, value in logged.items()} and "val/loss" in told
    assert "train/loss" not in card.text


def test_a_checkpoint_keeps_what_the_card_says(run):
    facts = stored_facts(read_facts(run[0] / "end.ckpt"), "card")
    assert facts["method"] == "DPO" and facts["steps"] == run[1].global_step
    assert "val/loss" in facts["metrics"]


def test_of_a_checkpoint_without_facts_what_else_it_says_is_told_and_damaged_ones_are_refused():
    told = {"algorithm": "SFT", "global_step": 7, "hyper_parameters": {"policy": "a/b"}}
    facts = stored_facts(told, "card")
    assert (facts["method"], facts["steps"], facts["start"]) == ("SFT", 7, "a/b")
    for damaged in ("text", {"steps": "many"}, {"metrics": 3}):
        with pytest.raises(UserError, match="the card"):
            stored_facts({"card": damaged}, "the card")


def test_metrics_of_training_are_told_where_no_rows_were_held_out(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    make_trainer(tmp_path, callbacks=[HuggingFaceExport()], max_steps=1).fit(module, data)
    assert "| train/loss |" in ModelCard.load(tmp_path / "model" / "README.md").text


@pytest.mark.filterwarnings("ignore:Be aware")
def test_a_finished_run_resumed_tells_what_it_had_measured(run, card, inputs, tmp_path):
    module, data = make_stage("dpo", inputs, beta=0.25)
    trainer = make_trainer(tmp_path, callbacks=[HuggingFaceExport()], max_steps=run[1].global_step)
    trainer.fit(module, data, ckpt_path=run[0] / "end.ckpt")
    told = re.findall(r"\| val/.* \|", ModelCard.load(tmp_path / "model" / "README.md").text)
    assert told and told == re.findall(r"\| val/.* \|", card.text)


def test_a_reward_model_and_an_adapter_say_how_they_are_loaded(folder, tmp_path):
    scorer, adapter = RewardModel(str(folder)), SFT(str(folder), lora=LoRA(r=2))
    for name, module in (("scorer", scorer), ("adapter", adapter)):
        export(module, module.exported_weights(), tmp_path / name)
    cards = {name: ModelCard.load(tmp_path / name / "README.md") for name in ("scorer", "adapter")}
    assert cards["scorer"].data.pipeline_tag == "text-classification" and "`score_bias`" in cards["scorer"].text
    assert cards["adapter"].data["library_name"] == "peft" and "score_bias" not in cards["adapter"].text
    whole = model_card(adapter.artefact(merge=True), card_facts(adapter))
    assert whole.data["library_name"] == "transformers"


def test_the_base_model_on_the_hub_is_known_through_all_stages(folder, tmp_path):
    assert base_model_of("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_model_of("demo") == base_model_of(str(folder)) == base_model_of("./not/there") == ""
    (tmp_path / "README.md").write_text("---\nbase_model: Qwen/Qwen3-0.6B\n---\ntext\n")
    assert base_model_of(str(tmp_path)) == "Qwen/Qwen3-0.6B"
    (tmp_path / "README.md").write_text("---\nbase_model: [\n---\n")
    assert base_model_of(str(tmp_path)) == ""


def test_the_hub_is_told_of_data_and_models_that_it_has_alone(folder):
    module = SFT(str(folder))
    facts = card_facts(module) | {"base_model": "Qwen/Qwen3-0.6B"}
    facts["settings"]["data"] = {"train": ["HuggingFaceH4/ultrachat_200k", "rows.jsonl", str(folder), "demo"]}
    data = model_card(module.artefact(), facts).data
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k"] and data.base_model == "Qwen/Qwen3-0.6B"


def test_no_card_says_where_on_a_machine_things_were():
    home = {"a": "/home/me/secret/runs/sft", "b": ["~/x/y"], "c": None, "d": {}, "e": "owner/name", "f": "/a\nb"}
    assert short(home) == {"a": ".../runs/sft", "b": [".../x/y"], "e": "owner/name", "f": "/a\nb"}
