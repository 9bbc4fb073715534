import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV3Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2MoeConfig,
    StableLmConfig,
)

from lit_rlhf.engine.packing import pack
from lit_rlhf.errors import UserError
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.policy import Policy, context_length, runs_packed
from lit_rlhf.models.probe import choose_attention, disable_dropout
from tests.tiny import (
    SHAPE,
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
FOUND = {  # what is special, and whether it still runs in packed rows
    "a window that only the mask knows": (
        Qwen2MoeConfig(
            **SHAPE,
            num_key_value_heads=4,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
            use_sliding_window=True,
            sliding_window=10,
        ),
        False,
    ),
    "a layout that does not reach the attention": (StableLmConfig(**SHAPE, num_key_value_heads=4), False),
    "positions by the mask alone": (BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4), False),
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
        True,
    ),
    "rotary embeddings by the longest row": (
        Phi3Config(**SHAPE, rope_parameters=LONG_ROPE, original_max_position_embeddings=24),
        True,
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
        True,
    ),
}


def spread(config):
    """A random policy as loading makes it."""
    model = spread_model(config, "eager").train()
    disable_dropout(model)
    return Policy(model)


@pytest.mark.parametrize("special", FOUND)
def test_whatever_is_special_about_a_model_its_numbers_are_its_own_in_training_and_generation(special):
    config, packed = FOUND[special]
    policy = spread(config).train()
    window = getattr(config, "sliding_window", None)
    choose_attention(policy, special)
    assert policy.training and runs_packed(policy.model) is packed
    assert getattr(policy.model.config, "sliding_window", None) == window
    examples = random_examples(4, longest=12)
    ours, _ = policy(pack(examples))  # in training mode
    assert torch.equal(policy(pack(examples))[0], ours)
    now = policy.model.config._attn_implementation
    policy.eval()
    own = torch.cat([plain_response_logprobs(policy.model, e.prompt_ids, e.responses[0], now) for e in examples])
    torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)

    ids, lengths = np.random.default_rng(0).integers(3, VOCABULARY, (2, 16)), np.array([14, 5])
    decoder = SlotDecoder(policy, 2, 16)
    decoder.logits(ids, lengths)
    with torch.no_grad():
        expected = torch.stack([plain_logits(policy.model, ids[i, : n + 1], now)[-1] for i, n in enumerate(lengths)])
    torch.testing.assert_close(decoder.logits(ids, lengths + 1), expected, rtol=1e-4, atol=1e-4)


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
    policy.model.forward = lambda *args, **kwargs: _doubled(forward(*args, **kwargs))
    with pytest.raises(UserError, match=r"odd: LlamaForCausalLM is not supported.*its head does more than multiply"):
        choose_attention(policy, "odd")


def test_a_model_that_stays_random_in_training_is_refused_by_the_cause():
    policy = tiny_policy()
    policy.model.model.layers[0].mlp.register_forward_hook(_noise)
    with pytest.raises(UserError, match="it draws random numbers while it trains; set dropout and noise to 0"):
        choose_attention(policy, "noisy")


def test_a_model_that_fails_altogether_is_refused_with_its_own_words():
    policy = tiny_policy()
    policy.model.model.forward = None
    with pytest.raises(UserError, match="Padded batches: TypeError: 'NoneType' object is not callable"):
        choose_attention(policy, "broken")


def test_a_cache_that_gives_other_logits_is_found_out(monkeypatch):
    monkeypatch.setattr(SlotDecoder, "_decode", lambda self, slots, *args: torch.zeros(len(slots), VOCABULARY))
    policy = tiny_policy()
    choose_attention(policy, "forgetful")
    assert not runs_packed(policy.model)


def _doubled(output):
    output.logits = output.logits * 2
    return output


def _noise(module, args, output):
    return output + torch.randn_like(output) if module.training else output
