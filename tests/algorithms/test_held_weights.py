"""Weights held otherwise than in float32, in whole runs: what learns is not rounded, no role sees another's dtype."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_rlhf import DPO, LoRA, ReferenceUpdate, RewardModelReward, UserError
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.loading import load_policy
from tests.algorithms.test_lora import fit, whole_and_resumed
from tests.models.test_adapter_folders import pytestmark
from tests.ppo_runs import Recorder, make
from tests.stages import STAGES, make_stage, make_trainer
from tests.tiny import random_examples

__all__ = ["pytestmark"]
ADAPTER = LoRA(r=4, alpha=8.0)
HELD = {"frozen_dtype": "bfloat16"}


def dtypes(module):
    """Of the weights that learn, and of the others, in all networks of a module."""
    weights = [p for network in module.networks() for p in network.parameters()]
    return tuple({p.dtype for p in weights if p.requires_grad == trained} for trained in (True, False))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_adapters_learn_in_float32_on_a_base_in_bfloat16(stage, precision, inputs, tmp_path):
    module = fit(stage, inputs, tmp_path, lora=ADAPTER, **HELD, trainer={"precision": precision, "max_epochs": 1})
    assert dtypes(module) == ({torch.float32}, {torch.bfloat16})
    moments = [state["exp_avg"].dtype for state in module.trainer.optimizers[0].state.values()]
    assert moments and set(moments) == {torch.float32}


def test_without_adapters_the_reference_alone_is_held_in_bfloat16_and_follows_no_other_dtype(inputs, tmp_path):
    for stage in ("dpo", "ppo"):
        module = fit(stage, inputs, tmp_path / stage, trainer={"max_epochs": 1}, **HELD)
        assert dtypes(module) == ({torch.float32}, {torch.bfloat16})
        start = load_policy(inputs / "model")
        for ours, theirs in zip(module.frozen["reference"].parameters(), start.parameters(), strict=True):
            assert torch.equal(ours, theirs.bfloat16())


def test_the_first_ratio_is_1_and_the_first_kl_0_on_a_base_in_bfloat16(inputs, tmp_path):
    module, data, trainer = make(inputs / "model", tmp_path, lora=ADAPTER, num_minibatches=1, **HELD)
    module.__class__, module.seen = Recorder, []
    trainer.fit(module, data)
    batch, logprobs = module.seen[0]
    assert torch.equal(logprobs, batch.old_logprobs)
    assert torch.equal(batch.ref_logprobs, batch.old_logprobs)
    assert module.rollout_metrics["rollout/sampler_gap"] < 0.02


@pytest.mark.parametrize("stage", ["reward_model", "ppo"])
def test_a_resumed_run_ends_with_the_same_bits(stage, inputs, tmp_path):
    whole, resumed = whole_and_resumed(stage, inputs, tmp_path, lora=ADAPTER, **HELD)
    assert resumed.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, whole.state_dict()[name]) for name, tensor in resumed.state_dict().items())


def test_what_is_merged_is_the_base_as_it_was_held_and_the_adapter_in_float32(inputs, tmp_path):
    module = fit("sft", inputs, tmp_path, lora=ADAPTER, learning_rate=0.05, merge=True, **HELD)
    written = load_file(tmp_path / "model" / "model.safetensors")
    layer = module.policy.model.model.layers[0].mlp.down_proj
    (a, b), scale = (layer.lora_A["policy"].weight, layer.lora_B["policy"].weight), 2.0
    expected = layer.base_layer.weight.float() + scale * (b @ a)
    name = "model.layers.0.mlp.down_proj.weight"
    assert written[name].dtype == torch.float32  # that of the source
    torch.testing.assert_close(written[name], expected.detach(), rtol=0, atol=1e-6)
    examples = random_examples(3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        ours = module.policy.eval()(pack(examples))[0]
        theirs = load_policy(tmp_path / "model")(pack(examples))[0]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.05)
    assert model.config.dtype == torch.float32


def test_options_that_leave_each_other_nothing_to_do_are_refused(inputs, tmp_path):
    module, data = make_stage("sft", inputs, **HELD)
    with pytest.raises(UserError, match=r"frozen_dtype \(bfloat16\) is of weights that never learn, and here all do"):
        make_trainer(tmp_path, max_epochs=1).fit(module, data)
    module, data = make_stage("sft", inputs, lora=ADAPTER, frozen_dtype="float32")
    with pytest.raises(UserError, match=r"frozen_dtype \(float32\) and trainer.precision \(bf16-true\) exclude"):
        make_trainer(tmp_path, max_epochs=1, precision="bf16-true").fit(module, data)
    with pytest.raises(UserError, match="reference_update moves the reference, and frozen_dtype is of weights"):
        DPO(str(inputs / "model"), reference_update=ReferenceUpdate(), **HELD)


def test_a_reward_model_is_held_as_asked_and_not_on_a_base_that_is_held_otherwise(inputs, tmp_path):
    fit("reward_model", inputs, tmp_path, lora=ADAPTER, trainer={"max_epochs": 1})
    folder = str(tmp_path / "model")
    alone = RewardModelReward(folder, frozen_dtype="bfloat16").scorer
    assert {p.dtype for n, p in alone.named_parameters() if "lora_" not in n} == {torch.bfloat16, torch.float32}
    assert {n for n, p in alone.named_parameters() if p.dtype == torch.float32 and "lora_" not in n} == {
        "model.score.weight"
    }
    policy = load_policy(inputs / "model", lora=ADAPTER)
    with pytest.raises(UserError, match=r"frozen_dtype \(bfloat16\) has nothing to say, since it stands on the policy"):
        RewardModelReward(folder, frozen_dtype="bfloat16").share(policy)
