"""Adapters in whole runs: each stage learns by one, its base stays, and what comes out works elsewhere."""

import itertools
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import peft
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf import DPO, PPO, SFT, EnsembleReward, LoRA, RewardModel, RewardModelReward, UserError
from lit_rlhf.algorithms import on_policy
from lit_rlhf.callbacks.export import HuggingFaceExport
from lit_rlhf.cli.export import export
from lit_rlhf.engine.packing import Example, pack
from lit_rlhf.models.loading import load_policy, load_scorer
from lit_rlhf.models.policy import freeze
from lit_rlhf.models.roles import OnTrunk
from lit_rlhf.rollout.scoring import Rewards
from tests.models.test_adapter_folders import pytestmark
from tests.ppo_runs import Recorder, make
from tests.stages import STAGES, make_stage, make_trainer

__all__ = ["pytestmark"]
ADAPTER = LoRA(r=4, alpha=8.0)
HEADED = LoRA(r=4, target_modules=["q_proj", "v_proj", "lm_head"])
KINDS = {
    "lora": ADAPTER,
    "dora": LoRA(r=2, use_dora=True),
    "rslora": LoRA(r=2, use_rslora=True),
    "headed": HEADED,
}


def fit(stage, inputs, folder, merge=None, trainer=None, ckpt_path=None, seed=0, **options):
    """A run of a stage that ends in an export."""
    torch.manual_seed(seed)  # of what is drawn: adapters, heads
    module, data = make_stage(stage, inputs, **options)
    saver = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True)
    callbacks = [HuggingFaceExport(merge=merge), saver]
    options = {"max_epochs": 2, "callbacks": callbacks, "enable_checkpointing": True} | (trainer or {})
    make_trainer(folder, **options).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module")
def sft(inputs, tmp_path_factory):
    """An adapter that SFT has trained."""
    folder = tmp_path_factory.mktemp("sft")
    fit("sft", inputs, folder, lora=ADAPTER)
    return folder / "model"


@pytest.fixture(scope="module")
def scorer(inputs, tmp_path_factory, sft):
    """An adapter that a reward model is, trained on top of that of SFT."""
    folder = tmp_path_factory.mktemp("scorer")
    fit_from(sft, "reward_model", inputs, folder, lora=ADAPTER)
    return folder / "model"


def fit_from(start, stage, inputs, folder, **options):
    """As `fit`, from another folder than the tiny model's."""
    (folder / "inputs").mkdir(parents=True)
    for file in Path(inputs).glob("*.jsonl"):
        (folder / "inputs" / file.name).symlink_to(file)
    (folder / "inputs" / "model").symlink_to(start)
    return fit(stage, folder / "inputs", folder, **options)


def whole_and_resumed(stage, inputs, folder, **options):
    """The module of a run, and of one that went on from its first epoch."""
    keep = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = {"max_epochs": 3, "callbacks": [keep], "enable_checkpointing": True}
    whole = fit(stage, inputs, folder / "whole", trainer=trainer, **options)
    again = ModelCheckpoint(folder, filename="{epoch}-again", save_top_k=-1, save_on_train_epoch_end=True)
    trainer = {"max_epochs": 3, "callbacks": [again], "enable_checkpointing": True}
    # What a module draws at its start, here by another seed, is not what the run goes on with.
    path = folder / "epoch=0.ckpt"
    return whole, fit(stage, inputs, folder / "resumed", trainer=trainer, ckpt_path=path, seed=11, **options)


def base_weights(module):
    """The frozen weights of a module's networks by name, copied."""
    named = itertools.chain.from_iterable(network.named_parameters() for network in module.networks())
    return {name: p.clone() for name, p in named if not p.requires_grad}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_learns_by_an_adapter_and_leaves_the_base_as_it_was(stage, inputs, tmp_path):
    kept = {}

    class Start(Callback):
        def on_train_start(self, trainer, pl_module):
            kept.update(base_weights(pl_module))
            kept["learning"] = {n: p.clone() for n, p in pl_module.named_parameters() if p.requires_grad}

    module = fit(stage, inputs, tmp_path, lora=ADAPTER, trainer={"callbacks": [Start()], "enable_checkpointing": False})
    learnt, after = kept.pop("learning"), base_weights(module)
    assert after.keys() == kept.keys() and all(torch.equal(after[name], kept[name]) for name in kept)
    moved = {name for name, p in module.named_parameters() if p.requires_grad and not torch.equal(p, learnt[name])}
    assert moved == set(learnt)
    heads = {name for name in moved if ".lora_" not in name}
    assert {name.rpartition(".")[0] for name in heads} == {
        "sft": set(),
        "dpo": set(),
        "reward_model": {"reward_model.model.score"},
        "ppo": {"policy.heads.critic.linear"},
    }[stage]
    assert len(list(module.networks())) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_holds_what_learns_alone_and_a_resumed_run_ends_the_same_to_the_bit(stage, inputs, tmp_path):
    whole, module = whole_and_resumed(stage, inputs, tmp_path, lora=ADAPTER)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"].keys() == trained
    for name in trained:
        assert torch.equal(whole.get_parameter(name), module.get_parameter(name)), name


def greedy(model, ids, count=6):
    """Tokens that a model of transformers writes behind these."""
    given = torch.tensor([ids])
    out = model.eval().generate(given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False)
    return out[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_adapter_and_merged_weights_generate_the_same_tokens_in_transformers_and_peft(kind, inputs, tmp_path):
    options = {"lora": KINDS[kind], "learning_rate": 0.05}
    module = fit("sft", inputs, tmp_path / "adapter", **options)
    fit("sft", inputs, tmp_path / "merged", merge=True, **options)
    folder = tmp_path / "adapter" / "model"
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    models = {
        "by PEFT": peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), folder),
        "by transformers": AutoModelForCausalLM.from_pretrained(folder),
        "merged": AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "model"),
        "here": load_policy(folder).model.eval(),
    }
    ids = [5, 9, 12]
    models["here"].set_attn_implementation("eager")
    written = {name: greedy(model, ids) for name, model in models.items()}
    assert len({tuple(tokens) for tokens in written.values()}) == 1, written
    with torch.no_grad():
        logits = {name: model(torch.tensor([ids])).logits for name, model in models.items()}
        policy = module.policy.eval()
        policy.switch()
        policy.model.set_attn_implementation("eager")
        expected = policy.model(torch.tensor([ids])).logits
        assert not torch.allclose(base(torch.tensor([ids])).logits, expected, atol=0.05)
    for name, found in logits.items():
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("merge", [False, True])
def test_a_reward_model_scores_the_same_in_transformers_and_peft(merge, sft, inputs, tmp_path):
    module = fit_from(sft, "reward_model", inputs, tmp_path, lora=ADAPTER, merge=merge)
    folder, ids = tmp_path / "model", [5, 9, 12, 7]
    if merge:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        bias = model.config.score_bias
    else:
        model = peft.AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        bias = json.loads((folder / "score_bias.json").read_text())["score_bias"]
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 8  # that of SFT and its own
    with torch.no_grad():
        score = model.eval()(torch.tensor([ids])).logits.item() + bias
        batch = pack([Example(torch.tensor(ids[:1]).numpy(), (torch.tensor(ids[1:]).numpy(),))])
        ours = load_scorer(folder)(batch, batch.last_nodes).item()
        shift = bias - module.reward_model.bias
        learnt = module.reward_model.eval()(batch, batch.last_nodes).item() + shift
    assert score == pytest.approx(ours, abs=1e-5) == pytest.approx(learnt, abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "merge"), [("sft", None), ("dpo", True), ("ppo", None), ("reward_model", None), ("reward_model", True)]
)
def test_a_checkpoint_exports_by_itself_what_its_run_exports(stage, merge, sft, inputs, tmp_path):
    validated = {"limit_val_batches": 1.0}  # as the normalisation of scores asks for
    fit_from(sft, stage, inputs, tmp_path / "run", lora=ADAPTER, merge=merge, trainer=validated)
    export(str(tmp_path / "run" / "last.ckpt"), str(tmp_path / "out"), merge=merge)
    files = {file.name for file in (tmp_path / "run" / "model").iterdir()}
    name = "model.safetensors" if merge else "adapter_model.safetensors"
    assert {file.name for file in (tmp_path / "out").iterdir()} | {"score_bias.json"} == files | {"score_bias.json"}
    ours, theirs = load_file(tmp_path / "out" / name), load_file(tmp_path / "run" / "model" / name)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_export_is_refused_that_would_stand_on_nothing(sft, inputs, tmp_path):
    with pytest.raises(UserError, match=r"export.merge is true, and the run trains no adapter"):
        fit("sft", inputs, tmp_path / "a", merge=True)
    with pytest.raises(UserError, match=r"export.merge is false, and merge_start makes a base .* on no disk"):
        fit_from(sft, "dpo", inputs, tmp_path / "b", merge=False, lora=ADAPTER, merge_start=True)
    fit_from(sft, "dpo", inputs, tmp_path / "c", lora=ADAPTER, merge_start=True)
    assert (tmp_path / "c" / "model" / "model.safetensors").exists()


def bare(policy):
    """Storages of the base's tensors in a network."""
    return {
        p.untyped_storage().data_ptr() for n, p in policy.named_parameters() if ".lora_" not in n and "heads" not in n
    }


def test_ppo_holds_one_base_for_policy_reference_critic_and_reward_model(sft, scorer, inputs, tmp_path):
    """And the reference is SFT's adapter on and the policy's off, to the bit."""
    options = {"critic": str(scorer), "lora": ADAPTER, "ppo_epochs": 2, "num_minibatches": 2}
    module, data, trainer = make(sft, tmp_path, trainer={"max_epochs": 2}, **options)
    data.rewards = Rewards(RewardModelReward(str(scorer)))
    expected, judge = freeze(load_policy(sft)), freeze(load_scorer(scorer))
    trainer.fit(module, data)
    assert isinstance(module.critic, OnTrunk) and not module.frozen
    assert list(module.networks()) == [module.policy] and not list(data.rewards.networks())
    assert module.policy.adapters.names == ["start", "policy", "critic", "reward_1"]
    plain = load_policy(inputs / "model")
    assert len(bare(module.policy)) == len(bare(plain)) == len({p.data_ptr() for p in plain.parameters()})
    (term,) = data.rewards.terms
    batch = pack([Example(torch.tensor([5, 6]).numpy(), (torch.tensor([7, 8, 9]).numpy(),))])
    with torch.no_grad():
        assert torch.equal(module.reference(batch)[0], expected(batch)[0])
        assert not torch.equal(module.policy(batch)[0], expected(batch)[0])
        ours = term.reward.scorer(batch, batch.last_nodes)
        torch.testing.assert_close(ours, judge(batch, batch.last_nodes), rtol=1e-5, atol=1e-5)


def test_the_members_of_an_ensemble_stand_on_the_policys_base_each_by_its_adapter(sft, scorer, tmp_path):
    twin = shutil.copytree(scorer, tmp_path / "twin")
    weights = load_file(twin / "adapter_model.safetensors")
    save_file({name: 2 * weight for name, weight in weights.items()}, twin / "adapter_model.safetensors")
    module, _, _ = make(sft, tmp_path, lora=ADAPTER)
    ensemble, asked = EnsembleReward([str(scorer), str(twin)], 0.5), ([np.array([5, 6])], [np.array([7, 8, 9])])
    ensemble.share(module.policy)
    ensemble.bind(module.tokenizer, module.device)
    assert not list(ensemble.networks()) and all(isinstance(v, OnTrunk) for v in ensemble.views("reward").values())
    apart = []
    for folder in (scorer, twin):
        apart.append(RewardModelReward(str(folder)))
        apart[-1].bind(module.tokenizer, module.device)
    one, other = (member(*asked).item() for member in apart)
    assert abs(one - other) > 1e-3
    assert ensemble(*asked).item() == pytest.approx((one + other) / 2 - 0.5 * abs(one - other) / 2, abs=1e-5)


@pytest.mark.parametrize(
    ("lora", "hold"),
    [
        (ADAPTER, {}),
        (HEADED, {}),
        (KINDS["dora"], {"hold_critic": "head"}),
        (HEADED, {"hold_critic": "model", "hold_reference": "parked"}),
    ],
)
def test_the_first_ratio_of_ppo_is_1_and_its_first_kl_is_0(lora, hold, inputs, tmp_path):
    module, data, trainer = make(inputs / "model", tmp_path, lora=lora, num_minibatches=1, **hold)
    module.__class__, module.seen = Recorder, []
    trainer.fit(module, data)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    torch.testing.assert_close(batch.ref_logprobs, batch.old_logprobs, rtol=1e-6, atol=1e-6)
    assert module.rollout_metrics["rollout/sampler_gap"] < 1e-5


@pytest.mark.parametrize("hold", ["base", "copy", "parked"])
def test_where_the_reference_lives_changes_no_number(hold, sft, inputs, tmp_path):
    weights = []
    for where in (hold, None):
        (tmp_path / str(where)).mkdir(exist_ok=True)
        module, data, trainer = make(sft, tmp_path / str(where), lora=ADAPTER, hold_reference=where)
        trainer.fit(module, data)
        weights.append(module.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_dpo_caches_the_reference_by_its_own_weights(inputs, sft, tmp_path, monkeypatch):
    """An adapter that is new changes nothing of the key; that of SFT, which the reference has on, does."""
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    files = lambda: {file.name for file in (tmp_path / "cache").rglob("*.safetensors")}  # noqa: E731
    quiet = {"trainer": {"max_epochs": 1, "enable_checkpointing": False, "callbacks": []}, "cache_reference": True}
    fit("dpo", inputs, tmp_path / "whole", **quiet)
    whole = files()
    fit("dpo", inputs, tmp_path / "adapter", lora=ADAPTER, seed=5, **quiet)
    assert files() == whole and len(whole) == 1
    fit_from(sft, "dpo", inputs, tmp_path / "on", lora=ADAPTER, **quiet)
    module = fit_from(sft, "dpo", inputs, tmp_path / "further", **quiet)
    assert len(files()) == len(whole) * 2
    assert module.policy.adapters.names == ["policy", "reference"]
    other = Path(shutil.copytree(sft, tmp_path / "other"))  # of the same settings, with other weights
    file = other / "adapter_model.safetensors"
    save_file({name: w * 1.5 for name, w in load_file(file).items()}, file, metadata={"format": "pt"})
    fit_from(other, "dpo", inputs, tmp_path / "of_other", **quiet)
    assert len(files()) == len(whole) * 3


def test_dropout_is_refused_in_dpo_and_ppo_and_taken_in_sft_and_by_reward_models(inputs):
    dropped = LoRA(dropout=0.1)
    for stage in (DPO, PPO):
        with pytest.raises(UserError, match=r"lora.dropout \(0.1\) must be 0"):
            stage(str(inputs / "model"), lora=dropped)
    for stage in (SFT, RewardModel):
        stage(str(inputs / "model"), lora=dropped)


def test_a_reference_that_moves_moves_whole_weights(inputs):
    from lit_rlhf import ReferenceUpdate

    with pytest.raises(UserError, match="reference_update moves whole weights, and here an adapter learns"):
        DPO(str(inputs / "model"), lora=ADAPTER, reference_update=ReferenceUpdate())
    with pytest.raises(UserError, match=r"hold_reference \(copy\) and cache_reference: drop one"):
        DPO(str(inputs / "model"), lora=ADAPTER, cache_reference=True, hold_reference="copy")


def test_a_module_comes_back_from_its_checkpoint(sft, inputs, tmp_path):
    module = fit_from(sft, "ppo", inputs, tmp_path, lora=ADAPTER)
    loaded = PPO.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.policy.origin == module.policy.origin
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("hold", ["adapter", "model"])
def test_a_critic_that_goes_backward_first_changes_no_bit(hold, inputs, tmp_path, monkeypatch):
    early, weights = Mock(side_effect=on_policy.backward_early), []
    monkeypatch.setattr(on_policy, "backward_early", early)
    for takes in (True, False):
        monkeypatch.setattr(on_policy, "takes_gradients_early", lambda trainer, takes=takes: takes)
        torch.manual_seed(0)
        module, data = make_stage("ppo", inputs, lora=ADAPTER, hold_critic=hold)
        make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=1.0).fit(module, data)
        weights.append({name: weight.clone() for name, weight in module.state_dict().items()})
    assert early.call_count == 2 * 2 * 2  # micro-batches of the run that takes them, all of its passes
    assert all(torch.equal(weight, weights[1][name]) for name, weight in weights[0].items())
