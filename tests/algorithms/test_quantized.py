"""Runs with bitsandbytes: a base in NF4 under adapters, and Adam's moments in 8 bits; it runs on CPUs as on GPUs."""

import copy
import shutil

import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_rlhf import DPO, LoRA, RewardModelReward, UserError
from lit_rlhf.engine.memory import bytes_of, shapes
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.holding import num_weights
from lit_rlhf.models.loading import load_policy
from tests.algorithms.test_lora import fit, fit_from, whole_and_resumed
from tests.ppo_runs import Recorder, make
from tests.stages import STAGES, make_stage, make_trainer
from tests.tiny import SHAPE, random_examples

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quantized` is not installed")
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given 'model' is already in"),
    pytest.mark.filterwarnings("ignore:.*MatMul.*"),
]
QLORA = {"lora": LoRA(r=4, alpha=8.0), "frozen_dtype": "nf4"}


def layers(network):
    """The layers in NF4, by name."""
    return {name: m for name, m in network.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_learns_by_an_adapter_on_a_base_in_nf4_and_goes_on_from_a_checkpoint(stage, inputs, tmp_path):
    whole, resumed = whole_and_resumed(stage, inputs, tmp_path, **QLORA)
    (network,) = whole.networks()
    assert len(layers(network)) >= 14 and not any("score" in name or "lm_head" in name for name in layers(network))
    others = {p.dtype for n, p in network.named_parameters() if not p.requires_grad}
    assert others == {torch.uint8, torch.bfloat16}
    assert {p.dtype for p in network.parameters() if p.requires_grad} == {torch.float32}
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_base_in_nf4_takes_what_a_plan_counts(inputs):
    held = load_policy(inputs / "model", **QLORA)
    with shapes():
        planned = load_policy(inputs / "model", **QLORA)
    states = [layer.weight.quant_state for layer in layers(held).values()]
    scales = [tensor for state in states for tensor in (state.absmax, state.state2.absmax)]
    assert bytes_of(planned.parameters()) == bytes_of([*held.parameters(), *scales])
    assert sum(map(num_weights, planned.parameters())) == sum(map(num_weights, held.parameters()))


def test_the_first_ratio_is_1_on_a_base_in_nf4(inputs, tmp_path):
    module, data, trainer = make(inputs / "model", tmp_path, num_minibatches=1, **QLORA)
    module.__class__, module.seen = Recorder, []
    trainer.fit(module, data)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs) and torch.equal(batch.ref_logprobs, batch.old_logprobs)
    assert module.rollout_metrics["rollout/sampler_gap"] < 0.02


@pytest.mark.parametrize("stage", ["sft", "reward_model"])
def test_what_is_merged_is_the_base_as_it_was_learnt_on(stage, inputs, tmp_path):
    module = fit(stage, inputs, tmp_path, merge=True, learning_rate=0.05, **QLORA)
    (network,) = module.networks()
    written = load_file(tmp_path / "model" / "model.safetensors")
    layer = network.model.model.layers[0].mlp.down_proj
    weight = layer.base_layer.weight
    held = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    role = "policy" if stage == "sft" else "reward_model"
    expected = held + 2.0 * (layer.lora_B[role].weight @ layer.lora_A[role].weight)
    torch.testing.assert_close(written["model.layers.0.mlp.down_proj.weight"], expected.detach(), rtol=0, atol=1e-6)
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()


def test_an_adapter_learnt_on_nf4_is_a_start_on_any_base(inputs, tmp_path):
    fit("sft", inputs, tmp_path / "sft", **QLORA)
    start = tmp_path / "sft" / "model"
    AutoModelForCausalLM.from_pretrained(start)
    fit_from(start, "dpo", inputs, tmp_path / "dpo", lora=LoRA(r=2), frozen_dtype="bfloat16")
    fit_from(start, "dpo", inputs, tmp_path / "nf4", frozen_dtype="nf4", hold_reference="copy")


def test_a_reference_and_a_reward_model_may_be_in_nf4(inputs, tmp_path):
    module = fit("dpo", inputs, tmp_path / "dpo", reference=str(inputs / "model"), frozen_dtype="nf4")
    assert len(layers(module.frozen["reference"])) == 14 and not layers(module.policy)
    fit("reward_model", inputs, tmp_path / "scorer", trainer={"max_epochs": 1})
    reward = RewardModelReward(str(tmp_path / "scorer" / "model"), frozen_dtype="nf4")
    assert len(layers(reward.scorer)) == 14
    exact = RewardModelReward(str(tmp_path / "scorer" / "model"))
    prompts, responses = zip(*((e.prompt_ids, e.responses[0]) for e in random_examples(8)), strict=True)
    ours, theirs = (torch.from_numpy(one(prompts, responses)) for one in (reward, exact))
    assert torch.corrcoef(torch.stack([ours, theirs]))[0, 1] > 0.9


def test_a_copy_of_a_base_in_nf4_gives_its_numbers(inputs):
    policy = load_policy(inputs / "model", **QLORA)
    examples = random_examples(4)
    with torch.no_grad():
        assert torch.equal(policy(pack(examples))[0], copy.deepcopy(policy)(pack(examples))[0])


def test_what_nf4_cannot_be_made_of_is_refused(inputs, tmp_path):
    with pytest.raises(UserError, match="nf4 is made of weights as they are read, and this reference is a copy"):
        DPO(str(inputs / "model"), frozen_dtype="nf4")
    fit("sft", inputs, tmp_path, lora=LoRA(r=2), trainer={"max_epochs": 1})
    with pytest.raises(UserError, match="nf4 is made of weights as they are in a folder, and merge_start changes them"):
        load_policy(tmp_path / "model", merge_start=True, **QLORA)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_moments_in_8_bits_learn_and_go_on_from_a_checkpoint_to_the_same_bits(stage, wide, tmp_path):
    whole, resumed = whole_and_resumed(stage, wide, tmp_path, optimizer="adamw_8bit", learning_rate=1e-3)
    states = whole.trainer.optimizers[0].state
    embeddings = {m.weight for m in whole.modules() if isinstance(m, torch.nn.Embedding)}
    kinds = {p in embeddings: states[p]["state1"].dtype for p in states if p.numel() >= 4096}
    assert kinds == {True: torch.float32, False: torch.uint8}
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())


@pytest.fixture(scope="module")
def wide(inputs, tmp_path_factory):
    """Files beside a model with matrices of 4096 weights and more, below which nothing is quantised."""
    folder = tmp_path_factory.mktemp("wide") / "inputs"
    shutil.copytree(inputs, folder)
    config = LlamaConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 128}, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def test_what_is_quantised_is_not_held_in_pieces(inputs, tmp_path):
    for options in ({"optimizer": "adamw_8bit"}, QLORA):
        module, _ = make_stage("sft", inputs, **options)
        trainer = make_trainer(tmp_path, max_epochs=1)
        trainer.strategy.__class__ = ModelParallelStrategy
        module.trainer = trainer
        with pytest.raises(UserError, match="cannot be held in pieces"):
            module.setup("fit")
