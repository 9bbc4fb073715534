"""What holds for all LightningModules: splits of a batch, precision, and the tokens that the tokenizer has."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf import SFT, LoRA, UserError
from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.models.checkpointing import Checkpointing
from lit_rlhf.rollout.play import GenerationSettings
from tests.ppo_runs import record
from tests.stages import STAGES, make_stage, make_trainer
from tests.tiny import VOCABULARY, save_padded

UNUSED = [20, *range(VOCABULARY, 56)]


@pytest.fixture(scope="module")
def padded(inputs, tmp_path_factory):
    """Files of each format beside models with 56 and with 40 embeddings for 39 tokens."""
    folders = {}
    for rows in (56, VOCABULARY):
        folders[rows] = shutil.copytree(inputs, tmp_path_factory.mktemp("padded") / "inputs")
        shutil.rmtree(folders[rows] / "model")
        save_padded(folders[rows] / "model", rows=rows)
    return folders


@pytest.mark.parametrize("stage", ["sft", "dpo", "ppo"])
def test_every_stage_learns_as_if_ids_without_a_token_were_not_there(stage, padded, tmp_path):
    metrics = []
    for folder in padded.values():
        module, data = make_stage(stage, folder)
        if stage == "ppo":
            torch.nn.init.normal_(module.critic.model.score.weight, generator=torch.Generator().manual_seed(0))
        trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=None, gradient_clip_val=1.0)
        trainer.fit(module, data)
        metrics.append({name: value.item() for name, value in trainer.callback_metrics.items()})
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_first_ratio_is_exactly_one_with_ids_that_stand_for_no_token(padded, tmp_path, precision):
    module = record(padded[56] / "model", tmp_path, entropy_coef=0.1, trainer={"precision": precision})
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    assert module.rollout_metrics["rollout/kl"] == 0.0
    assert module.rollout_metrics["rollout/sampler_gap"] < (1e-4 if precision == "32-true" else 0.1)
    for batch, _ in module.seen:
        assert not np.isin(batch.packed.target_ids.numpy(), UNUSED).any()
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_completions_and_samples_have_no_id_without_a_token(padded, tmp_path):
    module, _ = make_stage("sft", padded[56], generation=GenerationSettings(max_new_tokens=20, temperature=3.0))
    rng = np.random.default_rng(0)
    prompts = PromptBatch([rng.integers(3, 19, 4) for _ in range(32)], {})
    rows = module.predict_step(prompts, 0)
    words = {word for row in rows for word in row["completion"].split()}
    assert words <= {f"w{i}" for i in range(3, VOCABULARY)} - {"w20"}
    assert len(words) > 30


def test_tokens_added_before_a_run_are_learnt(padded, tmp_path):
    module, data = make_stage("sft", padded[56])
    module.tokenizer.add_tokens(["new"])
    (tmp_path / "new.jsonl").write_text('{"prompt": "w3", "completion": " new"}\n' * 8)
    data.sources |= {"train": str(tmp_path / "new.jsonl"), "validation": None}
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module, data)
    assert trainer.callback_metrics["train/loss"] < 10  # e to the power of it is the number of ids, not of the mask
    module.tokenizer.add_tokens([f"new{i}" for i in range(20)])
    with pytest.raises(UserError, match=r"model\.tokenizer: the tokenizer has ids up to"):
        make_trainer(tmp_path, max_epochs=1).fit(module, data)


@pytest.mark.parametrize("from_scratch", [True, False])
def test_transformers_generates_no_id_without_a_token_from_what_was_trained(from_scratch, padded, tmp_path):
    _, data = make_stage("sft", padded[56])
    module = SFT(str(padded[56] / "model"), from_scratch=from_scratch)
    make_trainer(tmp_path, max_steps=1, callbacks=[HuggingFaceExport()]).fit(module, data)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert exported.generation_config.suppress_tokens == UNUSED
    torch.manual_seed(0)
    written = exported.generate(torch.tensor([[5, 6, 7]] * 64), do_sample=True, top_k=0, max_new_tokens=16)
    assert not np.isin(written[:, 3:].numpy(), UNUSED).any()


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


class Numbers(Callback):
    """The dtypes of what batches bring along beside ids."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen |= {
            column.dtype for column in batch if isinstance(column, torch.Tensor) and column.is_floating_point()
        }


@pytest.mark.parametrize("stage", STAGES)
def test_what_batches_bring_along_is_not_rounded_in_half_precision(stage, inputs, tmp_path):
    numbers = Numbers()
    make_trainer(tmp_path, precision="bf16-true", max_epochs=1, callbacks=[numbers]).fit(*make_stage(stage, inputs))
    assert numbers.seen == {torch.float32}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("lora", [None, LoRA(r=4)])
def test_a_run_that_computes_activations_twice_ends_with_the_same_bits(stage, lora, inputs, tmp_path, monkeypatch):
    """Adapters that are on differ from pass to pass of PPO and DPO; rollouts and the reference need no second pass."""
    blocks, weights = [], []
    run = Checkpointing.run
    monkeypatch.setattr(
        Checkpointing, "run", lambda self, *args, **kwargs: blocks.append(1) or run(self, *args, **kwargs)
    )
    for twice in (False, True):
        torch.manual_seed(0)  # of what is drawn: adapters, heads
        module, data = make_stage(stage, inputs, lora=lora, activation_checkpointing=twice)
        trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=1.0)
        trainer.fit(module, data)
        assert bool(blocks) == twice
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_ranks_that_would_do_the_same_work_are_refused(inputs, tmp_path):
    module, _ = make_stage("sft", inputs)
    module._trainer = SimpleNamespace(world_size=8)
    module._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: 4)}
    with pytest.raises(UserError, match=r"tensor_parallel_size is 4, .* set .*: 1 and data_parallel_size: 8"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:.*(no `val_dataloader`|num_workers|log_every_n_steps)")
@pytest.mark.parametrize(
    ("run", "rows"), [("fit", [1, 2]), ("validate", [{"input_ids": 1}]), ("test", [[1]]), ("predict", ["text"])]
)
def test_loaders_of_other_batches_are_refused_in_place_of_a_data_module(run, rows, inputs, tmp_path):
    module, _ = make_stage("sft", inputs)
    said = r"^SFT takes its batches from a SFTDataModule, and was given a loader of \w+s: pass datamodule=SFTDataModule"
    with pytest.raises(UserError, match=said):
        getattr(make_trainer(tmp_path, max_steps=1, limit_val_batches=1), run)(module, DataLoader(rows))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("stage", "options"), [("sft", {"from_scratch": True}), ("reward_model", {})])
def test_random_weights_are_measured_by_no_run_but_fit(stage, options, inputs, tmp_path):
    module, data = make_stage(stage, inputs, **options)
    for run in ("validate", "test"):
        with pytest.raises(UserError, match=r"random.*or (name )?a checkpoint as ckpt_path"):
            getattr(make_trainer(tmp_path, limit_val_batches=1, limit_test_batches=1), run)(module, data)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=1, num_sanity_val_steps=1)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "trained.ckpt")
    trainer.validate(module, data)

    for run in ("validate", "test"):
        module, data = make_stage(stage, inputs, **options)
        trainer = make_trainer(tmp_path, limit_val_batches=1, limit_test_batches=1)
        getattr(trainer, run)(module, data, ckpt_path=tmp_path / "trained.ckpt")


def test_a_checkpoint_is_named_by_its_path(inputs, tmp_path):
    with (
        (inputs / "sft.jsonl").open() as file,
        pytest.raises(UserError, match=r"^checkpoint_path \(<.*\) must be text or Path$"),
    ):
        SFT.load_from_checkpoint(file)
