import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf import LoRA
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.adapter_exports import own_weights, stacked, whole_adapter, write_adapter
from lit_rlhf.models.adapter_folders import SCORE
from lit_rlhf.models.loading import load_policy
from tests.models.adapted import KINDS, linear_names, move, relative
from tests.models.test_adapter_folders import IDS, logits, pytestmark, save_adapter
from tests.tiny import plain_logits, random_examples, save_tiny

__all__ = ["pytestmark"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_peft_loads_what_is_written_and_gives_the_same_numbers(architecture, kind, tmp_path):
    base = save_tiny(tmp_path / "base", architecture)
    lora = LoRA(r=4, target_modules=linear_names(architecture), rank_pattern={"0.*": 2}, **KINDS[kind])
    policy = load_policy(base, lora=lora)
    move(policy, "policy")
    settings, weights = whole_adapter(policy.origin, policy.model.state_dict())
    (tmp_path / "out").mkdir()
    write_adapter(tmp_path / "out", json.loads(json.dumps(settings)), weights, {})
    with torch.no_grad():
        expected = plain_logits(policy.model, IDS)
    assert relative(logits(tmp_path / "out", base, IDS), expected) < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()  # transformers alone finds the base
    with torch.no_grad():
        assert relative(model(torch.tensor([IDS])).logits[0], expected) < 1e-5


def test_only_the_named_adapters_weights_are_its_own():
    held = {
        "a.lora_A.policy.weight": 1,
        "a.lora_A.policy_2.weight": 2,
        "policy.b.lora_B.other.weight": 3,
        "c.weight": 4,
    }
    held |= {"a.lora_magnitude_vector.policy.weight": 5, "e.lora_embedding_A.policy": 6}
    own = {"a.lora_A.weight": 1, "a.lora_magnitude_vector.weight": 5, "e.lora_embedding_A": 6}
    assert own_weights(held, "policy") == own
    assert own_weights(held | {SCORE: 7}, "policy") == own | {SCORE: 7}


@pytest.mark.parametrize("rslora", [False, True])
def test_two_adapters_as_one_give_the_numbers_of_their_sum(rslora, tmp_path):
    base = save_tiny(tmp_path / "base")
    below = save_adapter(tmp_path / "below", base, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3})
    lora = LoRA(r=2, alpha=5.0, target_modules=["v_proj", "o_proj", "embed_tokens"], use_rslora=rslora)
    policy = load_policy(below, lora=lora)
    move(policy, "policy")
    with torch.no_grad():
        policy.switch()
        expected = plain_logits(policy.model, IDS)
    settings, weights = whole_adapter(policy.origin, policy.model.state_dict())
    assert settings["r"] == 5 and len(settings["rank_pattern"]) == 5  # q_proj and o_proj of two layers, the embeddings
    (tmp_path / "sum").mkdir()
    write_adapter(tmp_path / "sum", settings, weights, {})
    assert relative(logits(tmp_path / "sum", base, IDS), expected) < 1e-5
    batch = pack(random_examples(4))
    assert relative(load_policy(tmp_path / "sum")(batch)[0], policy(batch)[0]) < 1e-5


def test_a_sum_keeps_what_else_the_upper_one_holds():
    one = {"r": 1, "lora_alpha": 2}, {"a.lora_A.weight": torch.ones(1, 3), "a.lora_B.weight": torch.ones(2, 1)}
    head = torch.ones(1, 3)
    _, weights = stacked(one, (one[0], one[1] | {SCORE: head}))
    assert weights[SCORE] is head
    assert torch.equal(weights["a.lora_B.weight"] @ weights["a.lora_A.weight"], torch.full((2, 3), 4.0))
