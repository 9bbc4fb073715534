import copy
import json
import shutil

import pytest
import torch
from transformers import GenerationConfig

from lit_rlhf import LoRA, UserError
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.adapter_exports import whole_adapter
from lit_rlhf.models.adapter_folders import BIAS_FILE
from lit_rlhf.models.adapters import lora_layers
from lit_rlhf.models.loading import load_policy, load_policy_with_tokenizer, load_scorer
from tests.models.adapted import move, relative
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import CONFIGS, IMPLEMENTATION, random_examples, save_tiny, spread_model, tiny_tokenizer

__all__ = ["pytestmark"]
BATCH = pack(random_examples(5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A base, an adapter of it, and a reward model's adapter."""
    root = tmp_path_factory.mktemp("starts")
    base = save_tiny(root / "base")
    save_adapter(root / "adapter", base)
    save_adapter(root / "scorer", base, task="SEQ_CLS")
    return root


def test_an_adapter_in_the_folder_goes_on_learning_where_no_other_is_asked_for(runs):
    policy = load_policy(runs / "adapter")
    assert policy.active == ("policy",) and policy.origin.start is None and not policy.origin.fresh
    learning = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert learning and all(".policy." in name for name in learning)
    assert policy.origin.base == str(runs / "base") and policy.origin.settings["r"] == 3


def test_another_adapter_learns_on_top_of_the_one_in_the_folder(runs):
    start, policy = load_policy(runs / "adapter"), load_policy(runs / "adapter", lora=LoRA(r=2))
    assert policy.active == ("start", "policy") and policy.origin.start == str(runs / "adapter")
    assert torch.equal(policy(BATCH)[0], start(BATCH)[0])
    assert all(".policy." in name for name, p in policy.named_parameters() if p.requires_grad)
    move(policy, "policy")
    assert not torch.equal(policy(BATCH)[0], start(BATCH)[0])
    assert torch.equal(policy(BATCH, adapters=("start",))[0], start(BATCH)[0])


@pytest.mark.parametrize("load", [load_policy, load_scorer])
def test_a_merged_start_is_a_whole_model_that_learns_whole_or_by_an_adapter(load, runs):
    folder = runs / ("adapter" if load is load_policy else "scorer")
    expected, whole = load(folder), load(folder, merge_start=True)
    given = (BATCH,) if load is load_policy else (BATCH, BATCH.last_nodes)
    first = lambda network: network(*given)[0] if load is load_policy else network(*given)  # noqa: E731
    assert relative(first(whole), first(expected)) < 1e-5
    assert whole.adapters is None and not list(lora_layers(whole.model))
    assert all(p.requires_grad for p in whole.parameters())
    adapted = load(folder, merge_start=True, lora=LoRA(r=2))
    assert relative(first(adapted), first(expected)) < 1e-5
    assert adapted.origin.merged and adapted.active == (adapted.origin.name,)


def test_the_dropout_that_an_adapter_was_trained_with_is_off(runs, tmp_path):
    save_adapter(tmp_path / "dropped", runs / "base", lora_dropout=0.5)
    policy = load_policy(tmp_path / "dropped").train()
    assert torch.equal(policy(BATCH)[0], policy(BATCH)[0])


def test_a_reward_models_adapter_brings_its_head_and_its_bias(runs, tmp_path):
    folder = shutil.copytree(runs / "scorer", tmp_path / "scorer")
    (folder / BIAS_FILE).write_text(json.dumps({"score_bias": 1.5}))
    plain, biased = load_scorer(runs / "scorer"), load_scorer(folder)
    torch.testing.assert_close(biased(BATCH, BATCH.last_nodes), plain(BATCH, BATCH.last_nodes) + 1.5)
    assert not plain.fresh_head and plain.model.score.weight.requires_grad
    fresh = load_scorer(runs / "scorer", fresh_head=True)
    assert not torch.equal(fresh.model.score.weight, plain.model.score.weight)
    with pytest.raises(UserError, match="holds a reward model"):
        load_policy(folder)


def test_a_policys_adapter_is_the_trunk_of_a_reward_model_with_a_fresh_head(runs):
    policy, scorer = load_policy(runs / "adapter"), load_scorer(runs / "adapter", fresh_head=None)
    assert scorer.fresh_head and scorer.origin.settings["task_type"] == "SEQ_CLS"
    for ours, theirs in zip(
        scorer.adapters.parameters("reward_model"), policy.adapters.parameters("policy"), strict=True
    ):
        assert torch.equal(ours, theirs)
    with pytest.raises(UserError, match="holds no trained reward head"):
        load_scorer(runs / "adapter")


def test_an_adapter_of_the_head_would_be_lost_in_a_reward_model(runs, tmp_path):
    save_adapter(tmp_path / "headed", runs / "base", target_modules=["q_proj", "lm_head"])
    load_policy(tmp_path / "headed")
    with pytest.raises(UserError, match=r"adapters of lm_head would be lost: LlamaForSequenceClassification"):
        load_scorer(tmp_path / "headed", fresh_head=True)


def test_an_adapter_of_another_base_is_refused(runs, tmp_path):
    wider = tmp_path / "wider"
    config = copy.deepcopy(CONFIGS["llama"])
    config.intermediate_size = 56
    spread_model(config, IMPLEMENTATION).save_pretrained(wider)
    tiny_tokenizer().save_pretrained(wider)
    for name, base in (("shape", wider), ("layers", save_tiny(tmp_path / "gpt2", "gpt2"))):
        folder = shutil.copytree(runs / "adapter", tmp_path / name)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)}))
        with pytest.raises(UserError, match=rf"{name}: .*(another base than {base}|{base} is loaded, has no such)"):
            load_policy(folder)


def test_dora_does_not_add_up_with_an_adapter_below(runs, tmp_path):
    with pytest.raises(UserError, match=r"DoRA \(lora.use_dora\) scales the whole weight; set merge_start: true, or"):
        load_policy(runs / "adapter", lora=LoRA(use_dora=True))
    save_adapter(tmp_path / "dora", runs / "base", use_dora=True)
    with pytest.raises(UserError, match=r"DoRA \(that of .*dora\) scales"):
        load_policy(tmp_path / "dora", lora=LoRA())
    load_policy(tmp_path / "dora", lora=LoRA(use_dora=True), merge_start=True)


def test_what_there_is_nothing_to_merge_of_or_to_freeze_is_refused(runs):
    with pytest.raises(UserError, match=r"merge_start: .*base holds no adapter"):
        load_policy(runs / "base", merge_start=True)
    with pytest.raises(UserError, match="from_scratch draws these: drop one"):
        load_policy(runs / "base", from_scratch=True, lora=LoRA())


def test_tokenizer_and_stop_tokens_are_those_beside_the_adapter_or_of_its_base(runs, tmp_path):
    policy, tokenizer = load_policy_with_tokenizer(runs / "adapter")
    assert len(tokenizer) == 40 and policy.model.generation_config.eos_token_id == 2
    folder = shutil.copytree(runs / "adapter", tmp_path / "adapter")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder)
    policy, tokenizer = load_policy_with_tokenizer(folder)
    assert tokenizer.chat_template == "{{ messages }}" and policy.model.generation_config.eos_token_id == [2, 7]


def test_a_pattern_of_layers_leaves_the_scalar_head_to_learn_as_a_whole(runs):
    lora = LoRA(r=2, target_modules=r".*(q_proj|score)")
    scorer = load_scorer(runs / "base", fresh_head=True, lora=lora)
    assert {name.rpartition(".")[2] for name in scorer.adapters.layers} == {"q_proj"}
    assert scorer.model.score.weight.requires_grad
    assert "score.weight" in whole_adapter(scorer.origin, scorer.model.state_dict())[1]


def test_a_base_that_is_not_there_is_told_with_the_adapter_that_names_it(runs, tmp_path):
    folder = shutil.copytree(runs / "scorer", tmp_path / "scorer")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "empty"}))
    (folder / "empty").mkdir()
    for load in (load_policy, load_scorer):
        with pytest.raises(UserError, match=rf"^{folder}: its base: {folder}/empty: no model could be loaded there"):
            load(folder)
    with pytest.raises(UserError, match=r"scorer holds a reward model \(an adapter for SEQ_CLS\), not a policy"):
        load_policy(runs / "scorer")
