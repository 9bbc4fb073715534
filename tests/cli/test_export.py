"""`lit-rlhf export`: a checkpoint by itself becomes the folder that its run would have written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_rlhf import SFT, LoRA, ProcessRewardModel, RewardModel
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.callbacks.export import export
from lit_rlhf.cli.checkpoints import WholeCheckpointIO
from lit_rlhf.models.adapter_folders import BIAS_FILE
from tests.cli.command_line import run
from tests.models.adapted import move
from tests.stages import STAGES, make_stage, make_trainer, write_inputs
from tests.tiny import tiny_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['content'] }} w39 {% endfor %}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """As everywhere; the model's tokenizer has a special token more, its weights are bfloat16."""
    folder = tmp_path_factory.mktemp("inputs")
    write_inputs(folder)
    AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).save_pretrained(folder / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w39"]})
    tokenizer.save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory):
    """A run of each stage, with its export and its last checkpoint; of data with a chat template where there may be."""
    folders = {}
    for stage in STAGES:
        folder = folders[stage] = tmp_path_factory.mktemp(stage)
        module, data = make_stage(stage, inputs)
        if stage != "ppo":
            data.tokenization = replace(data.tokenization, chat_template=TEMPLATE)
        saver = ModelCheckpoint(dirpath=folder, filename="end")
        options = {"max_epochs": 1, "limit_val_batches": None, "enable_checkpointing": True}
        make_trainer(folder, callbacks=[saver, HuggingFaceExport()], **options).fit(module, data)
    return folders


def same(folder, other):
    """Whether two exports hold the same."""
    names = {path.name for path in folder.iterdir()}
    assert names == {path.name for path in other.iterdir()}
    weights = [load_file(path / "model.safetensors") for path in (folder, other)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    for name in names - {"model.safetensors"}:
        assert (folder / name).read_text() == (other / name).read_text(), name


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_is_exported_as_its_run_exports_it(finished, tmp_path, stage):
    assert run("export", f"--ckpt_path={finished[stage] / 'end.ckpt'}", f"--folder={tmp_path / 'model'}") == 0
    same(tmp_path / "model", finished[stage] / "model")


def test_an_export_from_a_checkpoint_reads_no_weights_and_no_data_of_the_run(finished, inputs, tmp_path):
    shape = shutil.copytree(inputs / "model", tmp_path / "moved", ignore=shutil.ignore_patterns("*.safetensors"))
    checkpoint = finished["dpo"] / "end.ckpt"
    options = [f"--ckpt_path={checkpoint}", f"--folder={tmp_path / 'model'}", "--dtype=float32"]
    assert run("export", *options, f"--policy={shape}") == 0
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, state[f"policy.model.{name}"]) for name, tensor in weights.items())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float32"


def edited(finished, folder, stage="sft", **changes):
    """A checkpoint with other facts or, by None, without."""
    checkpoint = torch.load(finished[stage] / "end.ckpt", weights_only=True) | changes
    WholeCheckpointIO().save_checkpoint(
        {key: value for key, value in checkpoint.items() if value is not None}, folder / "edited.ckpt"
    )
    return folder / "edited.ckpt"


def test_a_checkpoint_of_a_reward_model_that_no_validation_has_seen_is_exported_as_learnt_and_said(finished, tmp_path):
    scores = {"normalize": "mean", "bias": 0.25, "moments": None}
    checkpoint = edited(finished, tmp_path, "reward_model", scores=scores)
    with pytest.warns(UserWarning, match=r"the scores are exported as learnt, not normalised \(mean\)"):
        assert run("export", f"--ckpt_path={checkpoint}", f"--folder={tmp_path / 'model'}") == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["score_bias"] == 0.25


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, ["--policy=nowhere/model"], "nowhere/model: no model could be loaded there"),
        (
            {"hyper_parameters": {"policy": "./gone"}},
            [],
            "./gone is what the run started from: where is it now? Name it by",
        ),
        ({"hyper_parameters": None}, [], "does not say what its run started from"),
        ({"hyper_parameters": [1]}, [], "name that model by --policy"),
        ({"tokens": None}, [], "does not say what to export; its run does so, resumed by fit --ckpt_path"),
        ({"tokens": 7}, [], "has 40 tokens and that of the run had 7"),
        ({}, ["--folder=notes"], "folder: notes is there and no export of a model"),
        ({}, ["--folder=start"], "folder: start holds what the run starts from (policy)"),
        ({"hyper_parameters": {"policy": "start", "reference": "other"}}, ["--folder=other"], "from (reference)"),
        ({"RolloutDataModule": {"stands_on": {"data.reward": {"other": "1"}}}}, ["--folder=other"], "(data.reward)"),
        ({}, ["--ckpt_path=gone.ckpt"], "ckpt_path: there is no checkpoint"),
        ({"state_dict": {"critic.model.weight": torch.ones(1)}}, [], "holds no weights of a policy"),
        ({"state_dict": {"policy.model.lm_head.weight": torch.full((40, 32), torch.nan)}}, [], "another model"),
    ],
)
def test_what_cannot_be_exported_is_answered_in_one_line(
    finished, inputs, tmp_path, monkeypatch, capsys, changes, options, words
):
    monkeypatch.chdir(tmp_path)
    for name in ("start", "other"):
        Path(name).symlink_to(inputs / "model") if name == "start" else shutil.copytree(inputs / "model", name)
    Path("notes").mkdir()
    Path("notes", "precious.txt").write_text("mine")
    checkpoint = edited(finished, tmp_path, **changes)
    assert run("export", f"--ckpt_path={checkpoint}", "--folder=model", *options) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[0] and len(said) <= 2
    assert not Path("model").exists() and Path("notes", "precious.txt").exists()


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_takes_its_arguments_from_the_user_and_not_from_the_checkpoint(finished, inputs, tmp_path):
    model = ["--model=lit_rlhf.SFT", f"--model.policy={inputs / 'model'}", "--model.learning_rate=0.125"]
    data = ["--data=lit_rlhf.SFTDataModule", f"--data.train={inputs / 'sft.jsonl'}", "--data.validation=null"]
    trainer = ["--trainer.accelerator=cpu", "--trainer.max_epochs=2", f"--trainer.default_root_dir={tmp_path}"]
    trainer += ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    assert run("fit", *model, *data, *trainer, f"--ckpt_path={finished['sft'] / 'end.ckpt'}") == 0
    (file,) = tmp_path.rglob("hparams.yaml")
    assert "learning_rate: 0.125" in file.read_text()


@pytest.fixture(scope="module")
def adapter(inputs, tmp_path_factory):
    """The folder of an adapter that has moved, on the tiny model."""
    target = tmp_path_factory.mktemp("adapter") / "model"
    module = SFT(str(inputs / "model"), lora=LoRA(r=2))
    move(module.policy, "policy")
    export(module, module.exported_weights(), target)
    return target


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks transformers for it
def test_an_exported_adapter_is_merged_as_peft_does_it(adapter, tmp_path):
    target = tmp_path / "model"
    assert run("export", f"--model={adapter}", f"--folder={target}", "--merge", "--dtype=float32") == 0
    merged = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).merge_and_unload().state_dict()
    weights = load_file(target / "model.safetensors")
    assert weights.keys() <= merged.keys()
    for name, tensor in weights.items():
        assert torch.allclose(tensor, merged[name], atol=1e-6), name
    assert (adapter / "README.md").read_text() != (target / "README.md").read_text()
    assert ModelCard.load(target / "README.md").data["library_name"] == "transformers"
    assert ModelCard.load(target / "README.md").text == ModelCard.load(adapter / "README.md").text


def test_an_adapter_that_is_exported_anew_stays_one(adapter, tmp_path):
    assert run("export", f"--model={adapter}", f"--folder={tmp_path / 'model'}") == 0
    weights = [load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "model")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_an_export_is_written_anew_with_the_same_weights_in_another_dtype_and_smaller_files(finished, tmp_path, stage):
    source, target = finished[stage] / "model", tmp_path / "model"
    options = ["--dtype=float16", "--max_shard_size=10KB"]
    assert run("export", f"--model={source}", f"--folder={target}", *options) == 0
    files = sorted(target.glob("model-*.safetensors"))
    assert len(files) > 1 and (target / "model.safetensors.index.json").exists()
    weights = {name: tensor for file in files for name, tensor in load_file(file).items()}
    before = load_file(source / "model.safetensors")
    assert weights.keys() == before.keys()
    assert all(torch.equal(tensor, before[name].half()) for name, tensor in weights.items())
    mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (source, target))
    assert mine | {"dtype": "float16"} == theirs
    assert (source / "README.md").read_text() == (target / "README.md").read_text()


@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("kind", [RewardModel, ProcessRewardModel])
def test_a_model_that_scores_is_written_anew_with_all_that_its_scores_need(inputs, tmp_path, kind, lora):
    module = kind(str(inputs / "model"), lora=lora)
    getattr(module, kind.exported).model.config.score_bias = 0.25
    if kind is ProcessRewardModel:
        module.step_separator = " w3"
    export(module, module.exported_weights(), tmp_path / "before")
    assert run("export", f"--model={tmp_path / 'before'}", f"--folder={tmp_path / 'after'}") == 0
    before, after = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    settings = json.loads(before["config.json" if lora is None else BIAS_FILE])
    assert settings["step_separator"] == " w3" if kind is ProcessRewardModel else settings["score_bias"] == 0.25
    weights = "model.safetensors" if lora is None else "adapter_model.safetensors"
    assert before.keys() == after.keys() and before[weights] == after[weights]
    for name in before.keys() - {weights}:
        assert before[name] == after[name], name


def test_an_export_is_pushed_where_it_is_asked_for_and_stays_where_that_fails(finished, tmp_path, monkeypatch, capsys):
    pushed = []
    monkeypatch.setattr("lit_rlhf.models.hub.push", lambda *given: pushed.append(given) or "https://hub/me/it")
    given = [f"--model={finished['sft'] / 'model'}", f"--folder={tmp_path / 'model'}", "--push=me/it"]
    assert run("export", *given, "--private") == 0
    assert pushed == [(tmp_path / "model", "me/it", True)]
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert run("export", *given) == 2
    assert "error: push: me/it was not uploaded" in capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "ckpt_path is missing; write lit-rlhf export"),
        (["--model=start", "--ckpt_path=end.ckpt"], "ckpt_path (end.ckpt) and model (start) are both given"),
        (["--model=start", "--policy=start"], "policy (start) must be null with model"),
        (["--model=start", "--merge"], "merge is true, and start holds no adapter"),
        (["--model=start", "--folder=start"], "folder: start holds what the run starts from"),
        (["--model=start", "--max_shard_size=5"], "max_shard_size (5) must be a size such as 5GB"),
        (["--model=start", "--push=it"], "push (it) must be owner/name"),
        (["--model=start", "--push=me/it/there"], "push: "),
        (["--model=start", "--private"], "private (True) must be null without push"),
        (["--model=nowhere/there"], "model: nowhere/there"),
    ],
)
def test_what_cannot_be_exported_anew_is_told_in_a_line(inputs, tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.chdir(tmp_path)
    Path("start").symlink_to(inputs / "model")
    assert run("export", "--folder=model", *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert said in line and not Path("model").exists()
