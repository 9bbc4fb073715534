import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lit_rlhf.engine import logprobs
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.decoding import SlotDecoder, make_decoder
from lit_rlhf.models.loading import load_policy, load_scorer, scorer_from_policy
from lit_rlhf.models.policy import Policy, frozen_copy
from lit_rlhf.models.trunk import runs_packed
from tests.tiny import (
    SINKS,
    plain_logits,
    plain_response_logprobs,
    random_examples,
    save_tiny,
    tiny_policy,
    tiny_tokenizer,
)


def test_a_loaded_policy_gives_the_logprobs_of_transformers(folder):
    policy = load_policy(folder)
    examples = random_examples(3)
    packed, _ = policy(pack(examples))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = torch.cat([plain_response_logprobs(model, e.prompt_ids, e.responses[0]) for e in examples])
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder_with_sinks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sinks") / "model"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(SINKS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.fill_(1.0)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_attention_that_packed_rows_lack_runs_in_padded_batches_and_says_so_once(folder_with_sinks, caplog):
    with caplog.at_level("INFO"):
        policy = load_policy(folder_with_sinks)
    assert caplog.text.count("runs in padded batches") == 1
    assert not runs_packed(policy.model)
    examples = random_examples(5, responses=2)
    batch = pack(examples)
    ours = batch.sum_by_sequence(policy(batch)[0])
    ours.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    separate = torch.stack(
        [
            plain_response_logprobs(policy.model, example.prompt_ids, example.responses[k], "eager").sum()
            for k in range(2)
            for example in examples
        ]
    )
    separate.square().sum().backward()
    torch.testing.assert_close(ours, separate, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients.items():
        expected = policy.get_parameter(name).grad
        assert (gradient - expected).norm() / expected.norm().clamp(min=1e-8) < 1e-5, name


def test_a_model_in_padded_batches_acts_and_scores_too(folder_with_sinks):
    policy = load_policy(folder_with_sinks).eval()
    assert not runs_packed(scorer_from_policy(policy).model)
    assert not runs_packed(frozen_copy(policy).model)
    decoder = make_decoder(policy, 2, 4)
    ids, lengths = np.array([[5, 6, 7, 0], [8, 9, 0, 0]]), np.array([3, 2])
    decoder.logits(ids, lengths)
    ids[[0, 1], lengths] = 10, 11
    with torch.no_grad():
        expected = [policy.model(torch.as_tensor(ids[i, : n + 1])[None]).logits[0, -1] for i, n in enumerate(lengths)]
    torch.testing.assert_close(decoder.logits(ids, lengths + 1), torch.stack(expected), rtol=1e-4, atol=1e-4)


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


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by transformers; PEFT asks for it
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # PEFT 0.19 of an adapter on the head
@pytest.mark.parametrize("way", ["get_peft_model", "inject_adapter_in_model"])
def test_adapters_of_peft_act_and_learn_on_trunk_and_head(way, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    plain, model = tiny_policy("qwen3").model, tiny_policy("qwen3").model
    model = (
        peft.get_peft_model(model, config) if way == "get_peft_model" else peft.inject_adapter_in_model(config, model)
    )
    policy, examples = Policy(model), random_examples(5)
    batch = pack(examples)
    expected = torch.cat([plain_response_logprobs(model, e.prompt_ids, e.responses[0]) for e in examples])
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if "lora" in name}
    assert any("lm_head" in name for name in gradients) and any("q_proj" in name for name in gradients)
    for chunk_most in (2**30, 5 * 4 * 40):  # the head at once, and a few tokens at a time
        monkeypatch.setattr(logprobs, "CHUNK_LEAST", 0)
        monkeypatch.setattr(logprobs, "CHUNK_MOST", chunk_most)
        policy.zero_grad()
        (-policy.nll(batch)).backward()
        torch.testing.assert_close(policy(batch)[0], expected, rtol=1e-4, atol=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(policy.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(Policy(plain)(batch)[0], expected, atol=1e-2)

    decoder, ids, lengths = SlotDecoder(policy, 2, 6), np.array([[5, 6, 7, 8, 9, 10]] * 2), np.array([5, 3])
    decoder.logits(ids, lengths)
    with torch.no_grad():
        logits = torch.stack([plain_logits(model, ids[i, : n + 1])[-1] for i, n in enumerate(lengths)])
    torch.testing.assert_close(decoder.logits(ids, lengths + 1), logits, rtol=1e-4, atol=1e-4)
