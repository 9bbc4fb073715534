import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Gemma2Config

from lit_rlhf.errors import UserError
from lit_rlhf.packing import IMPLEMENTATION, pack
from lit_rlhf.policy import (
    check_packed_logits,
    frozen_copy,
    load_policy,
    load_scorer,
    load_tokenizer,
    pad_token_id_for,
    scorer_from_policy,
)
from tests.tiny import EOS, VOCABULARY, plain_response_logprobs, random_examples, save_tiny, tiny_policy, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_a_loaded_policy_gives_the_logprobs_of_transformers(folder):
    policy = load_policy(folder)
    examples = random_examples(3)
    packed, _ = policy(pack(examples))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = torch.cat([plain_response_logprobs(model, e.prompt_ids, e.responses[0]) for e in examples])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


def test_from_scratch_ignores_the_stored_weights(folder):
    stored, fresh = load_policy(folder), load_policy(folder, from_scratch=True)
    assert stored.model.config.hidden_size == fresh.model.config.hidden_size
    assert not torch.equal(stored.head.weight, fresh.head.weight)


def test_a_missing_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no model could be loaded there.*there is no folder .*nowhere"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no weights, train it with from_scratch: true"):
        load_policy("demo")


def test_attention_with_a_soft_cap_is_refused_by_name():
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation=IMPLEMENTATION)
    with pytest.raises(UserError, match="attn_logit_softcapping is not supported"):
        check_packed_logits(model, "gemma")


def test_a_model_whose_packed_logprobs_differ_is_refused():
    policy = tiny_policy()
    forward = policy.model.forward
    policy.model.forward = lambda *args, **kwargs: _doubled(forward(*args, **kwargs))
    with pytest.raises(UserError, match="gives other log-probs in packed batches than by itself"):
        check_packed_logits(policy.model, "odd")


def _doubled(output):
    output.logits = output.logits * 2
    return output


def test_the_score_head_is_drawn_from_a_normal_of_one_over_root_d_plus_one(folder):
    weights = torch.cat([load_scorer(folder, fresh_head=True).model.score.weight.flatten() for _ in range(40)])
    d = 32
    assert weights.std().item() == pytest.approx((d + 1) ** -0.5, rel=0.1)


def test_a_causal_lm_is_no_reward_model(folder):
    with pytest.raises(UserError, match="holds no trained reward head"):
        load_scorer(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3"])
def test_scores_are_those_of_the_sequence_classifier_that_transformers_loads(tmp_path, architecture):
    scorer = load_scorer(save_tiny(tmp_path / "lm", architecture), fresh_head=True)
    scorer.model.config.pad_token_id = 0
    scorer.model.save_pretrained(tmp_path / "rm")
    examples = random_examples(4)
    batch = pack(examples)
    scores = load_scorer(tmp_path / "rm")(batch, batch.last_nodes)

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm", num_labels=1).eval()
    with torch.no_grad():
        expected = [
            model(torch.as_tensor(np.concatenate([e.prompt_ids, e.responses[0]]))[None]).logits[0, 0] for e in examples
        ]
    torch.testing.assert_close(scores, torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_critic_from_the_policy_shares_its_trunk_but_no_memory():
    policy = tiny_policy()
    critic = scorer_from_policy(policy)
    ours, theirs = policy.model.base_model.state_dict(), critic.model.base_model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}


def test_the_frozen_copy_stays_while_a_policy_with_tied_embeddings_learns():
    policy = tiny_policy("llama")
    assert policy.model.config.tie_word_embeddings
    reference, batch = frozen_copy(policy), pack(random_examples(3))
    before, _ = reference(batch)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    policy(batch)[0].sum().backward()
    optimizer.step()
    assert not torch.equal(policy(batch)[0], before)
    assert torch.equal(reference(batch)[0], before)
    assert not any(p.requires_grad for p in reference.parameters())


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match="the tokenizer has ids up to 40, the model embeds 40"):
        load_tokenizer(folder, load_policy(folder).model.config)


def test_the_tokenizer_knows_the_context_of_the_model(folder):
    assert load_tokenizer(folder, load_policy(folder).model.config).model_max_length == 64


def test_no_pad_token_that_ends_responses_is_stored_with_a_reward_model():
    assert pad_token_id_for(tiny_tokenizer()) == 0
    assert pad_token_id_for(tiny_tokenizer(pad_is_eos=True)) not in (None, EOS)
