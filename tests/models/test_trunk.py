import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import MixtralConfig, NemotronConfig, StableLmConfig

from lit_rlhf.engine.attention import IMPLEMENTATION
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.trunk import arguments_of, backbone, packed_hidden_states, packed_outputs, runs_packed
from tests.tiny import ARCHITECTURES, CONFIGS, SHAPE, random_examples, spread_model

EXPERTS = MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2)
FURTHER = {
    "experts": EXPERTS,
    "stablelm": StableLmConfig(**SHAPE, num_key_value_heads=2),
    "nemotron": NemotronConfig(**SHAPE, num_key_value_heads=2),
}


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *FURTHER])
def test_states_and_gradients_are_the_same_in_packed_rows_and_padded_batches(architecture):
    config = (CONFIGS | FURTHER)[architecture]
    packed, padded = (spread_model(copy.deepcopy(config), way) for way in (IMPLEMENTATION, "eager"))
    assert runs_packed(packed) and not runs_packed(padded)
    batch = pack(random_examples(5, responses=2))
    states = []
    for model in (packed, padded):
        states.append(packed_hidden_states(model, batch.input_ids, batch.position_ids, batch.layout))
        states[-1][batch.predictors].pow(3).sum().backward()
    used = torch.cat([batch.predictors, batch.last_nodes])
    assert_close(states[0][used], states[1][used], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(backbone(packed).parameters(), backbone(padded).parameters(), strict=True):
        scale = theirs.grad.abs().max() + 1e-3
        assert_close(ours.grad / scale, theirs.grad / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", [IMPLEMENTATION, "eager"])
def test_router_logits_are_those_of_each_token_alone(way):
    model, examples = spread_model(copy.deepcopy(EXPERTS), way), random_examples(4)
    batch = pack(examples)
    asked = {"output_router_logits": True}
    hidden, routers = packed_outputs(model, batch.input_ids, batch.position_ids, batch.layout, **asked)
    model.set_attn_implementation("eager")
    each = [model.model(torch.as_tensor([*e.prompt_ids, *e.responses[0]])[None], **asked) for e in examples]
    expected = [torch.cat(layer) for layer in zip(*(outputs.router_logits for outputs in each), strict=True)]
    assert len(routers) == EXPERTS.num_hidden_layers and routers[0].shape == (len(hidden), 3)
    for ours, theirs in zip(routers, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_router_logits_come_only_where_they_are_asked_for():
    model, batch = spread_model(copy.deepcopy(EXPERTS), IMPLEMENTATION), pack(random_examples(2))
    assert packed_outputs(model, batch.input_ids, batch.position_ids, batch.layout)[1] == ()


def test_what_a_model_takes_is_that_of_its_trunk():
    assert {"input_ids", "position_ids", "attention_mask"} <= arguments_of(spread_model(EXPERTS, "eager"))
