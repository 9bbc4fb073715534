import re

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    NemotronConfig,
    OPTConfig,
    Phi3Config,
    PhimoeConfig,
    Qwen2MoeConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    StableLmConfig,
)

from lit_rlhf.engine.packing import pack
from lit_rlhf.errors import UserError
from lit_rlhf.models.decoding import SlotDecoder, make_decoder
from lit_rlhf.models.loading import scorer_from_policy
from lit_rlhf.models.policy import Policy, context_length, frozen_copy
from lit_rlhf.models.probe import choose_attention, disable_dropout
from lit_rlhf.models.trunk import runs_packed
from tests.tiny import (
    SHAPE,
    SINKS,
    VOCABULARY,
    plain_logits,
    plain_response_logprobs,
    random_examples,
    spread_model,
    tiny_policy,
)

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": 24,
}
MOE = {"num_key_value_heads": 4, "num_experts_per_tok": 2}
FOUND = {  # what is special, whether it still runs in packed rows, and how it decodes if not
    "a window that only the mask knows": (
        Qwen2MoeConfig(
            **SHAPE,
            **MOE,
            num_experts=3,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=10,
        ),
        "together",
    ),
    "a mask and nothing else reaches the attention": (
        StableLmConfig(**SHAPE, num_key_value_heads=2, use_parallel_residual=True, qk_layernorm=True),
        "packed",
    ),
    "norms with one added to the weight": (NemotronConfig(**SHAPE, num_key_value_heads=2), "packed"),
    "logits multiplied": (CohereConfig(**SHAPE, num_key_value_heads=2, logit_scale=0.0625), "packed"),
    "logits divided": (
        GraniteConfig(**SHAPE, num_key_value_heads=2, logits_scaling=3.0, residual_multiplier=0.3),
        "packed",
    ),
    "noise by number while it trains": (
        MixtralConfig(**SHAPE, **MOE, num_local_experts=3, router_jitter_noise=1e-4, sliding_window=None),
        "packed",
    ),
    "experts drawn at random while it trains": (
        PhimoeConfig(**SHAPE, **MOE, num_local_experts=3, input_jitter_noise=0.01, sliding_window=None),
        "packed",
    ),
    "sinks": (SINKS, "together"),
    "positions by the mask alone": (
        BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4),
        "together",
    ),
    "a state instead of keys": (
        MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=8),
        "by state",
    ),
    "a state that padding would enter": (
        RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, attention_hidden_size=32),
        "alone",
    ),
    "a state within its modules, and capped logits": (
        RecurrentGemmaConfig(
            **{**SHAPE, "num_hidden_layers": 3, "num_key_value_heads": 2},
            lru_width=32,
            attention_window_size=5,
            logits_soft_cap=3.0,
        ),
        None,
    ),
    "values narrower than queries": (
        DeepseekV3Config(
            **SHAPE,
            num_key_value_heads=4,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            first_k_dense_replace=2,
        ),
        "packed",
    ),
    "rotary embeddings by the longest row": (
        Phi3Config(**SHAPE, rope_parameters=LONG_ROPE, original_max_position_embeddings=24),
        "packed",
    ),
    "dropout by number": (
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
            dropout=0.3,
            layerdrop=0.3,
        ),
        "packed",
    ),
}


def spread(config):
    """A random policy as loading makes it."""
    model = spread_model(config, "eager").train()
    disable_dropout(model)
    return Policy(model)


@pytest.mark.parametrize("special", FOUND)
def test_whatever_is_special_about_a_model_its_numbers_are_its_own_in_training_and_generation(special):
    config, way = FOUND[special]
    policy = spread(config).train()
    window = getattr(config, "sliding_window", None)
    choose_attention(policy, special)
    assert policy.training and runs_packed(policy.model) is (way == "packed")
    assert way == "packed" or policy.caching == way
    assert getattr(policy.model.config, "sliding_window", None) == window
    examples = random_examples(4, longest=12)
    ours, _ = policy(pack(examples))  # in training mode
    assert torch.equal(policy(pack(examples))[0], ours)
    weights = torch.linspace(-1, 1, len(ours))
    gradients = gradients_of(policy, ours @ weights)
    now = policy.model.config._attn_implementation
    policy.eval()
    own = torch.cat([plain_response_logprobs(policy.model, e.prompt_ids, e.responses[0], now) for e in examples])
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    for name, gradient in gradients_of(policy, own @ weights).items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-3, atol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )

    ids, lengths = np.random.default_rng(0).integers(3, VOCABULARY, (4, 16)), np.array([13, 5, 5, 4])
    decoder = make_decoder(policy, 4, 16)
    decoder.logits(ids, lengths, np.array([True, True, True, False]))
    for n in (1, 2):  # the last slot joins later
        with torch.no_grad():
            expected = [plain_logits(policy.model, ids[i, : end + n], now)[-1] for i, end in enumerate(lengths)]
        logits = decoder.logits(ids, lengths + n, np.ones(4, bool))
        torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-4)


def gradients_of(policy, loss):
    """By name; scaled so that the largest of all is 1."""
    policy.zero_grad()
    loss.backward()
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    largest = max(gradient.abs().max() for gradient in found.values())
    return {name: gradient / largest for name, gradient in found.items()}


@pytest.mark.parametrize(
    ("special", "scale"),
    [
        ("logits multiplied", 0.0625),
        ("logits divided", 1 / 3),
        ("sinks", 1.0),
        ("a state within its modules, and capped logits", 1.0),
    ],
)
def test_the_scale_of_logits_is_found_to_be_a_number_of_the_config(special, scale):
    policy = spread(FOUND[special][0])
    choose_attention(policy, special)
    assert policy.scale == scale


def test_a_scale_that_no_config_names_is_measured():
    policy = tiny_policy()
    forward = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: _changed(forward(*args, **kwargs), lambda logits: logits * 1.7)
    choose_attention(policy, "odd")
    assert policy.scale == pytest.approx(1.7, rel=1e-6)


@pytest.mark.parametrize(
    ("special", "cause"),
    [
        (
            "sinks",
            r"^sinks: GptOssForCausalLM does not run in packed rows \(hidden .*, first in GptOssAttention \(layers",
        ),
        ("a window that only the mask knows", r"differ by .* from its own, first in Qwen2MoeAttention \(layers.0.self"),
        ("positions by the mask alone", "BloomForCausalLM .* packed rows .its attention cannot be replaced"),
        ("a state instead of keys", "MambaForCausalLM does not run in packed rows .ValueError in MambaMixer: "),
        (
            "a state within its modules, and capped logits",
            "batches, and generates without a cache .LookupError in Policy: it hands out no cache",
        ),
        ("noise by number while it trains", "MixtralForCausalLM draws random numbers while it trains, so it stays in"),
        ("experts drawn at random while it trains", "PhimoeForCausalLM draws random numbers while it trains"),
    ],
)
def test_what_does_not_run_as_others_do_is_told_with_its_cause_in_one_line(special, cause, caplog):
    with caplog.at_level("INFO"):
        choose_attention(spread(FOUND[special][0]), special)
    (record,) = caplog.records
    assert re.search(cause, record.message)


def test_a_quiet_model_stays_in_evaluation_mode_whoever_trains_it_and_so_does_what_is_made_of_it():
    policy = spread(FOUND["noise by number while it trains"][0])
    choose_attention(policy, "noisy")
    scorer = scorer_from_policy(policy)
    for network in (policy, frozen_copy(policy), scorer):
        torch.nn.ModuleList([network]).train()
        assert network.quiet and network.training and not any(m.training for m in network.model.modules())
    choose_attention(scorer, "critic")
    assert scorer.quiet


def test_positions_at_which_embeddings_follow_the_neighbours_are_not_used(caplog):
    config, _ = FOUND["rotary embeddings by the longest row"]
    with caplog.at_level("INFO"):
        choose_attention(spread(config), "phi")
    assert "sequences may take 24 of its 64 positions" in caplog.text
    assert context_length(config) == 24
    assert context_length(LlamaConfig(**SHAPE)) == 64


def test_a_model_whose_numbers_depend_on_the_longest_row_unawares_is_not_packed(monkeypatch):
    policy = spread(FOUND["rotary embeddings by the longest row"][0])
    monkeypatch.setattr("lit_rlhf.models.probe.context_length", lambda config: 64)
    choose_attention(policy, "odd")
    assert not runs_packed(policy.model)


def test_a_model_whose_head_does_more_than_a_product_is_refused():
    policy = tiny_policy()
    forward = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: _changed(forward(*args, **kwargs), lambda logits: logits + logits**2)
    with pytest.raises(UserError, match=r"odd: LlamaForCausalLM is not supported.*its head does more than multiply"):
        choose_attention(policy, "odd")


def test_a_model_that_is_random_in_every_mode_is_refused():
    policy = tiny_policy()
    policy.model.model.layers[0].mlp.register_forward_hook(lambda _, args, output: output + torch.randn_like(output))
    with pytest.raises(UserError, match=r"noisy: LlamaForCausalLM is not supported"):
        choose_attention(policy, "noisy")


def test_a_model_that_fails_altogether_is_refused_with_its_own_words():
    policy = tiny_policy()
    policy.model.model.forward = None
    with pytest.raises(UserError, match="is not supported: TypeError in LlamaModel: 'NoneType' object is not callable"):
        choose_attention(policy, "broken")


def test_a_cache_that_gives_other_logits_is_found_out(monkeypatch):
    monkeypatch.setattr(SlotDecoder, "_decode", lambda self, slots, *args: torch.zeros(len(slots), VOCABULARY))
    policy = tiny_policy()
    choose_attention(policy, "forgetful")
    assert not runs_packed(policy.model)


def _changed(output, change):
    output.logits = change(output.logits)
    return output
