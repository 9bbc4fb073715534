"""What `fit` leaves behind: one whole export, in place of an older one and of nothing else."""

import json
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import SimpleProfiler
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf import LoRA, RewardModel, RewardModelReward, SFTDataModule, UserError
from lit_rlhf.callbacks.export import HuggingFaceExport, export
from lit_rlhf.cli.export import export as export_command
from lit_rlhf.engine.sharding import full_state_dict
from lit_rlhf.models.loading import load_scorer
from lit_rlhf.rollout.scoring import Rewards
from tests.callbacks.finished_runs import fit
from tests.stages import STAGES, make_stage, make_trainer, write_inputs
from tests.tiny import save_tiny


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("error", [SafetensorError("No space left on device"), OSError(28, "No space left on device")])
def test_a_disk_that_fills_up_under_the_weights_leaves_the_older_export_alone(inputs, tmp_path, monkeypatch, error):
    fit(inputs, tmp_path)
    before = weights(tmp_path)

    def full(self, folder, **kwargs):
        (folder / "config.json").write_text("{}")
        raise error

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(UserError, match="No space left on device"):
        fit(inputs, tmp_path)
    assert weights(tmp_path) == before
    assert not list(tmp_path.glob(".model*"))


def test_that_an_older_export_will_be_replaced_is_told_before_training(inputs, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("lit_rlhf.callbacks.export.rank_zero_info", said.append)
    fit(inputs, tmp_path)
    assert not any("will replace" in line for line in said)
    fit(inputs, tmp_path)
    (told,) = (number for number, line in enumerate(said) if "holds an export, which this run's will replace" in line)
    assert f"export.folder: {tmp_path / 'model'} " in said[told] and "exported SFT" in said[-1] and told < len(said) - 1


@pytest.mark.parametrize("folder", [".", "..", "notes"])
def test_what_is_no_export_is_never_replaced(inputs, tmp_path, folder):
    root = tmp_path / "run"
    for place in (root, root / "notes"):
        place.mkdir()
        (place / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is there and no export of a model; name a folder of its own"):
        fit(inputs, root, export=folder)
    assert (root / "precious.txt").exists() and (root / "notes" / "precious.txt").exists()
    assert not (root / "end.ckpt").exists(), "refused before training"


@pytest.mark.parametrize(
    "role", ["policy", "reference", "critic", "teacher", "data.reward", "policy, below the export"]
)
def test_what_a_run_starts_from_is_not_replaced_by_its_export(tmp_path, role):
    write_inputs(tmp_path, rows=4)
    start = {"policy": tmp_path / "model", "policy, below the export": tmp_path / "model"}.get(role, tmp_path / "other")
    stage = {"critic": "ppo", "data.reward": "ppo", "reference": "dpo", "teacher": "distillation"}.get(role, "sft")
    if start.name == "other" and stage in ("dpo", "distillation"):
        save_tiny(start)
    elif start.name == "other":
        scorer = RewardModel(str(tmp_path / "model"))
        export(scorer, full_state_dict(scorer.exportable()), start)
    options = {role: str(start)} if role in ("reference", "critic", "teacher") else {}
    module, data = make_stage(stage, tmp_path, **options)
    if role == "data.reward":
        data.rewards = Rewards(RewardModelReward(str(start)))
    if role.endswith("export"):
        (tmp_path / "config.json").write_text("{}")  # as an export that holds checkpoints of its own
        start = tmp_path
    (tmp_path / "link").symlink_to(start)
    for folder in (start, tmp_path / "link"):
        trainer = make_trainer(tmp_path, max_epochs=1, callbacks=[HuggingFaceExport(str(folder))])
        with pytest.raises(UserError, match=rf"export.folder: .* what the run starts from \({role.split(',')[0]}\)"):
            trainer.fit(module, data)
        assert trainer.global_step == 0, "refused before training"


@pytest.mark.parametrize("name", ["results.csv", "results.json", "eval.py", "checkpoints/", ".git/"])
def test_an_older_export_goes_with_nothing_else_in_it(inputs, tmp_path, name):
    fit(inputs, tmp_path)
    other = tmp_path / "model" / name
    other.mkdir() if name.endswith("/") else other.touch()
    with pytest.raises(
        UserError, match=rf"^export.folder: \S+/model holds {other.name} beside an export, and would be"
    ):
        fit(inputs, tmp_path)
    with pytest.raises(UserError, match=rf"^folder: \S+/model holds {other.name} beside an export"):
        export_command(str(tmp_path / "end.ckpt"), str(tmp_path / "model"))
    assert other.exists() and (tmp_path / "end.ckpt").stat().st_mtime_ns < other.stat().st_mtime_ns, "before training"


WRITERS = {  # what writes into a folder
    "checkpoints": lambda folder: {"callbacks": [ModelCheckpoint(folder)], "enable_checkpointing": True},
    "logs": lambda folder: {"logger": CSVLogger(folder)},
    "profile": lambda folder: {"profiler": SimpleProfiler(folder, "profile")},
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("below", ["", "below"])
@pytest.mark.parametrize("older", [True, False])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_a_run_writes_is_not_replaced_by_its_export(inputs, tmp_path, writer, older, below):
    module, data = make_stage("sft", inputs)
    if older:
        export(module, full_state_dict(module.exportable()), tmp_path / "model")
    options = WRITERS[writer](tmp_path / "model" / below)
    options["callbacks"] = [HuggingFaceExport(), *options.get("callbacks", [])]
    trainer = make_trainer(tmp_path, max_steps=1, **options)
    with pytest.raises(UserError, match=r"^export.folder: \S+/model (holds|is there and no export)"):
        trainer.fit(module, data)
    assert trainer.global_step == 0, "refused before training"


def test_the_folder_of_a_run_and_its_rows_are_not_replaced_by_its_export(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    for folder in (".", tmp_path / "run"):
        trainer = make_trainer(tmp_path / "run", max_steps=1, callbacks=[HuggingFaceExport(str(folder))])
        with pytest.raises(UserError, match=r"holds what the run writes \(trainer.default_root_dir\)"):
            trainer.fit(module, data)
    target = tmp_path / "run" / "model"
    export(module, full_state_dict(module.exportable()), target)
    rows = [json.loads(line) for line in (inputs / "sft.jsonl").read_text().splitlines()]
    (target / "rows.json").write_text(json.dumps(rows))
    data = SFTDataModule(str(target / "rows.json"), None, tokenizer=module.tokenizer, max_tokens=100)
    trainer = make_trainer(tmp_path / "run", max_steps=1, callbacks=[HuggingFaceExport()])
    with pytest.raises(UserError, match=r"holds what the run reads \(data.train\)"):
        trainer.fit(module, data)
    assert trainer.global_step == 0 and (target / "rows.json").exists()


def test_a_trial_of_one_batch_leaves_export_and_summary_of_the_real_run(inputs, tmp_path):
    fit(inputs, tmp_path)
    before = weights(tmp_path), (tmp_path / "summary.json").read_text()
    fit(inputs, tmp_path, fast_dev_run=True)
    assert (weights(tmp_path), (tmp_path / "summary.json").read_text()) == before


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("stage", "options"),
    [*((stage, {"limit_val_batches": 0}) for stage in STAGES), ("reward_model", {"max_epochs": -1, "max_steps": 2})],
)
def test_a_finished_run_is_exported_again_from_its_checkpoint(inputs, tmp_path, stage, options):
    fit(inputs, tmp_path, stage, **options)
    before = weights(tmp_path), json.loads((tmp_path / "model" / "config.json").read_text())
    summary = (tmp_path / "summary.json").read_text()
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    fit(inputs, tmp_path, stage, ckpt_path=tmp_path / "end.ckpt", **options)
    after = json.loads((tmp_path / "model" / "config.json").read_text())
    assert weights(tmp_path) == before[0]
    assert after.get("score_bias") == before[1].get("score_bias")
    assert (tmp_path / "summary.json").read_text() == summary, "nothing was trained, so nothing is to tell"
    if stage == "sft":
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def best_is_first(folder):
    """Keeps all checkpoints and takes the first one for the best: the one of the lowest epoch."""
    return ModelCheckpoint(dirpath=folder, filename="{epoch}", monitor="epoch", mode="min", save_top_k=-1)


def same_weights(folder, checkpoint, network="policy"):
    auto = AutoModelForSequenceClassification if network == "reward_model" else AutoModelForCausalLM
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return all(
        torch.equal(w, state[f"{network}.model.{name}"])
        for name, w in auto.from_pretrained(folder).state_dict().items()
    )


@pytest.mark.parametrize("stage", STAGES)
def test_the_best_checkpoint_by_a_monitor_is_exported_and_the_run_stays_at_its_last_weights(inputs, tmp_path, stage):
    options = {"max_epochs": 2, "saver": best_is_first(tmp_path)}
    if stage == "reward_model":
        options["limit_val_batches"] = 0  # so that the scores stay as learnt, see `test_reward_model.py`
        with pytest.warns(UserWarning, match="the scores are exported as learnt"):
            module = fit(inputs, tmp_path, stage, **options)
    else:
        module = fit(inputs, tmp_path, stage, **options)
    network = module.exported
    assert same_weights(tmp_path / "model", tmp_path / "epoch=0.ckpt", network)
    assert not same_weights(tmp_path / "model", tmp_path / "epoch=1.ckpt", network)
    last = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, last[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize(("which", "exported"), [("best", 0), ("last", 1)])
def test_which_weights_are_exported_is_an_option(inputs, tmp_path, which, exported):
    fit(inputs, tmp_path, which=which, max_epochs=2, saver=best_is_first(tmp_path))
    assert same_weights(tmp_path / "model", tmp_path / f"epoch={exported}.ckpt")


def test_the_best_checkpoint_of_a_reward_model_is_normalised_by_the_scores_that_its_validation_saw(inputs, tmp_path):
    torch.manual_seed(0)
    fit(inputs, tmp_path, "reward_model", max_epochs=2, saver=best_is_first(tmp_path))
    _, data = make_stage("reward_model", inputs)
    data.setup("fit")
    scorer = load_scorer(tmp_path / "model")
    with torch.no_grad():
        scores = torch.cat([scorer(b.packed, b.packed.last_nodes) for b in data.rows_dataloader("val")])
    assert scores.mean().item() == pytest.approx(0, abs=1e-4)
    assert scorer.bias != 0


def test_best_without_a_monitor_is_refused_before_training(inputs, tmp_path):
    with pytest.raises(UserError, match="is best, but no ModelCheckpoint has a monitor"):
        fit(inputs, tmp_path, which="best")
    assert not (tmp_path / "end.ckpt").exists()


def test_the_last_weights_are_exported_with_a_word_where_the_best_are_gone(inputs, tmp_path):
    class Lost(ModelCheckpoint):
        def on_train_end(self, trainer, pl_module):
            Path(self.best_model_path).unlink()

    saver = Lost(dirpath=tmp_path, filename="{epoch}", monitor="epoch", mode="min", save_top_k=-1)
    with pytest.warns(UserWarning, match=r"epoch=0.ckpt is gone: the last weights are exported"):
        fit(inputs, tmp_path, max_epochs=2, saver=saver)
    assert same_weights(tmp_path / "model", tmp_path / "epoch=1.ckpt")


def test_what_transformers_would_not_write_at_the_end_is_refused_before_training(inputs, tmp_path, monkeypatch):
    def refuses(self, folder, **kwargs):
        raise ValueError("this tokenizer cannot be saved")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuses)
    with pytest.raises(UserError, match="could not be exported at the end: this tokenizer cannot be saved"):
        fit(inputs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_step_into_ruin_is_not_exported(inputs, tmp_path):
    module, data = make_stage("sft", inputs, learning_rate=1e38, lr_scheduler="constant", warmup_steps=0)
    with pytest.raises(UserError, match="weights are ruined"):
        make_trainer(tmp_path, callbacks=[HuggingFaceExport()], max_steps=1).fit(module, data)
    assert not (tmp_path / "model").exists()


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


@pytest.mark.parametrize("folder", ["a_file/model", "m" * 300])
def test_a_folder_that_cannot_be_made_is_told_by_option_and_path_before_training(inputs, tmp_path, folder):
    (tmp_path / "a_file").touch()
    module, data = make_stage("sft", inputs)
    trainer = make_trainer(tmp_path, callbacks=[HuggingFaceExport(folder=folder)], max_steps=1)
    with pytest.raises(UserError, match=rf"^export\.folder: {tmp_path}/{folder} cannot be made \("):
        trainer.fit(module, data)
    assert trainer.global_step == 0


def test_a_folder_whose_name_the_locale_cannot_read_is_told_by_option_and_path(inputs, tmp_path):
    module, data = make_stage("sft", inputs)
    name = "exp\udcc3\udcbc"  # as Python reads an umlaut of UTF-8 under LC_ALL=C
    trainer = make_trainer(tmp_path, callbacks=[HuggingFaceExport(folder=name)], max_steps=1)
    with pytest.raises(UserError, match=r"^export\.folder: \S+/exp\\udcc3\\udcbc has letters .* LC_ALL=C\.UTF-8"):
        trainer.fit(module, data)


@pytest.mark.parametrize("name", ["sft", "reward_model", "process_reward_model"])
def test_the_export_of_an_adapter_replaces_an_older_one(name, inputs, tmp_path):
    for _ in range(2):
        torch.manual_seed(0)
        module, data = make_stage(name, inputs, lora=LoRA(r=2))
        make_trainer(tmp_path, callbacks=[HuggingFaceExport()], max_epochs=1).fit(module, data)
    held = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert "base_fingerprint.json" in held and ("score_bias.json" in held) is (name != "sft")
