import dataclasses

import numpy as np
import pytest
import torch

from lit_rlhf import LoRA, UserError
from lit_rlhf.engine import logprobs
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.adapters import Adapters, lora_layers, refuse_dropout
from lit_rlhf.models.decoding import SlotDecoder
from lit_rlhf.models.graphs import GraphedStep
from lit_rlhf.models.packed_linear import packed_linears
from lit_rlhf.models.policy import Policy, merged_copy
from tests.models.adapted import KINDS, adapted_policy, move, relative
from tests.tiny import ARCHITECTURES, plain_logits, plain_response_logprobs, random_examples, tiny_policy


def gradients(policy):
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_and_gradients_are_those_of_pefts_own_forward_on_separate_rows(architecture, kind, monkeypatch):
    policy, examples = adapted_policy(architecture, kind), random_examples(6)
    batch = pack(examples)
    expected = torch.cat([plain_response_logprobs(policy.model, e.prompt_ids, e.responses[0]) for e in examples])
    expected.sum().backward()
    own = gradients(policy)
    head = policy.model.get_output_embeddings()
    assert sum(p.grad is not None for p in head.parameters()) == (3 if kind == "dora" else 2)
    assert all(".lora_" in name for name in own)
    monkeypatch.setattr(logprobs, "CHUNK_LEAST", 0)
    for most in (2**30, 5 * 4 * 40):  # the logits at once, and those of a few tokens at a time
        monkeypatch.setattr(logprobs, "CHUNK_MOST", most)
        for total in (lambda: policy(batch)[0].sum(), lambda: -policy.nll(batch)):
            policy.zero_grad()
            total().backward()
            assert relative(policy(batch)[0], expected) < 1e-5
            found = gradients(policy)
            assert found.keys() == own.keys()
            assert max(relative(found[name], own[name]) for name in own) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_slot_cache_gives_the_logits_of_pefts_own_forward(architecture, kind):
    policy, ids = adapted_policy(architecture, kind), np.array([[5, 6, 7, 8, 9, 10]] * 3)
    lengths = np.array([4, 2, 3])
    with torch.no_grad():
        expected = torch.stack([plain_logits(policy.model, ids[i, : n + 1])[-1] for i, n in enumerate(lengths)])
    for graphed in (False, True):
        decoder = SlotDecoder(policy, 3, 6)
        if graphed:
            decoder.graphs = GraphedStep(policy, 3, 6, lambda step: step)
        with packed_linears(policy):
            decoder.logits(ids, lengths)
            assert relative(decoder.logits(ids, lengths + 1), expected) < 1e-5


def test_chunks_that_are_made_anew_have_the_adapters_of_their_first_pass(monkeypatch):
    """Another role's pass stands between a chunk's forward and its second making, in the backward pass."""
    policy, batch = adapted_policy(), pack(random_examples(6))
    policy(batch)[0].sum().backward()
    expected = gradients(policy)
    policy.zero_grad()
    monkeypatch.setattr(logprobs, "CHUNK_LEAST", 0)
    monkeypatch.setattr(logprobs, "CHUNK_MOST", 5 * 4 * 40)
    total = policy(batch)[0].sum()
    with torch.no_grad():
        policy(batch, adapters=())
    total.backward()
    for name, gradient in gradients(policy).items():
        assert relative(gradient, expected[name]) < 1e-5


def test_which_adapters_are_on_does_not_change_which_learn():
    policy = adapted_policy()
    policy.adapters.add("critic", LoRA(r=2).config("base", "SEQ_CLS"))
    policy.adapters.copy("policy", "start")
    for names in ((), ("start",), ("critic",), ("start", "policy")):
        policy.adapters.switch(names)
        learning = {name for name, p in policy.named_parameters() if p.requires_grad}
        assert learning == {n for n, _ in policy.named_parameters() if ".policy" in n or ".critic" in n}


def test_without_adapters_on_the_base_is_what_it_was_to_the_bit():
    plain, policy, batch = tiny_policy(), adapted_policy(), pack(random_examples(5))
    assert torch.equal(policy(batch, adapters=())[0], plain(batch)[0])
    assert not torch.allclose(policy(batch)[0], plain(batch)[0], atol=1e-2)


def test_a_new_adapter_changes_nothing_yet():
    plain, batch = tiny_policy(), pack(random_examples(5))
    expected = plain(batch)[0]
    for init in ("default", "gaussian"):
        policy = tiny_policy()
        policy.adapters = Adapters(policy.model, "base")
        policy.adapters.add("policy", LoRA(init=init).config("base", "CAUSAL_LM"))
        policy.active = ("policy",)
        assert torch.equal(policy(batch)[0], expected)


def test_dropout_is_that_of_pefts_own_forward():
    policy, example = adapted_policy(dropout=0.5, target_modules="all-linear"), random_examples(1)[0]
    policy.train()
    torch.manual_seed(3)
    expected = plain_response_logprobs(policy.model, example.prompt_ids, example.responses[0])
    torch.manual_seed(3)
    assert relative(policy(pack([example]))[0], expected) < 1e-5
    torch.manual_seed(4)
    assert relative(policy(pack([example]))[0], expected) > 1e-3
    policy.eval()
    assert torch.equal(policy(pack([example]))[0], policy(pack([example]))[0])


def test_dropout_is_refused_where_two_passes_must_agree():
    refuse_dropout(LoRA(), "PPO")
    refuse_dropout(None, "PPO")
    with pytest.raises(UserError, match=r"lora.dropout \(0.1\) must be 0 in PPO"):
        refuse_dropout(LoRA(dropout=0.1), "PPO")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", 0),
        ("alpha", 0.0),
        ("alpha", float("inf")),
        ("dropout", 1.0),
        ("target_modules", []),
        ("rank_pattern", {"q_proj": 0}),
        ("alpha_pattern", {"q_proj": -1.0}),
        ("alpha_pattern", {"(q_proj": 1.0}),
        ("r", 10**9),
        ("rank_pattern", {"q_proj": 10**9}),
        ("target_modules", "[q_proj"),
        ("exclude_modules", "*"),
    ],
)
def test_settings_that_mean_nothing_are_refused_by_their_name(option, value):
    with pytest.raises(UserError, match=rf"lora\.{option} "):
        LoRA(**{option: value})


@pytest.mark.parametrize(
    "given",
    [
        {"target_modules": ["q_proj", "query"]},
        {"exclude_modules": ["query"]},
        {"rank_pattern": {"query": 2}},
        {"alpha_pattern": {"query": 2.0}},
    ],
)
def test_a_layer_that_is_not_there_is_named_with_those_that_are(given):
    policy = tiny_policy()
    with pytest.raises(
        UserError, match=rf"lora\.{next(iter(given))}: no layer .* named .*query; there are .*q_proj, k_p"
    ):
        Adapters(policy.model, "base").add("policy", LoRA(**given).config("base", "CAUSAL_LM"))


def test_layers_are_those_that_the_options_name():
    policy = tiny_policy()
    lora = LoRA(
        r=4,
        target_modules=r".*self_attn\.(q|v)_proj",
        exclude_modules=["layers.0.self_attn.v_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        alpha_pattern={"v_proj": 1.0},
    )
    adapters = Adapters(policy.model, "base")
    adapters.add("policy", lora.config("base", "CAUSAL_LM"))
    assert {
        name.removeprefix("model.layers."): (layer.r["policy"], layer.scaling["policy"])
        for name, layer in adapters.layers.items()
    } == {
        "0.self_attn.q_proj": (4, 8.0),
        "1.self_attn.q_proj": (2, 16.0),
        "1.self_attn.v_proj": (4, 0.25),
    }


def test_all_linear_layers_get_one_but_the_head():
    policy = tiny_policy("qwen3")
    adapters = Adapters(policy.model, "base")
    adapters.add("policy", LoRA().config("base", "CAUSAL_LM"))
    linear = {name for name, module in tiny_policy("qwen3").model.named_modules() if type(module) is torch.nn.Linear}
    assert set(adapters.layers) == linear - {"lm_head"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_a_merged_copy_is_the_policy_and_no_part_of_it(architecture, kind):
    policy, batch = adapted_policy(architecture, kind), pack(random_examples(5))
    expected, before = policy(batch)[0], [p.clone() for p in policy.parameters()]
    merged = merged_copy(policy)
    assert merged.adapters is None and not list(lora_layers(merged.model))
    assert relative(merged(batch)[0], expected) < 1e-5
    assert all(torch.equal(*pair) for pair in zip(policy.parameters(), before, strict=True))
    assert torch.equal(policy(batch)[0], expected)
    # The head was tied to the embeddings, which its adapter is no part of.
    tied = policy.model.config.tie_word_embeddings
    assert tied == (architecture != "qwen3") and not merged.model.config.tie_word_embeddings
    embeddings = merged.model.get_input_embeddings().weight
    assert torch.equal(embeddings, policy.model.get_input_embeddings().weight)
    assert merged.model.get_output_embeddings().weight is not embeddings


def test_a_copy_of_an_adapter_stays_while_the_other_learns():
    policy, batch = adapted_policy(kind="dora"), pack(random_examples(5))
    expected = policy(batch)[0]
    policy.adapters.copy("policy", "reference")
    move(policy, "policy", seed=9)
    assert torch.equal(policy(batch, adapters=("reference",))[0], expected)
    assert not torch.equal(policy(batch)[0], expected)
    assert not any(p.requires_grad for p in policy.adapters.parameters("reference"))


def test_a_policy_that_a_user_has_given_adapters_acts_as_before():
    """`Policy(model)` of PEFT's own: nothing is switched behind its back."""
    policy = adapted_policy()
    other = Policy(policy.model)
    batch = pack(random_examples(3))
    assert torch.equal(other(batch)[0], policy(batch)[0])


def test_lora_is_plain_settings():
    assert dataclasses.asdict(LoRA(r=4, target_modules=["q_proj"]))["target_modules"] == ["q_proj"]


def test_one_plain_name_names_layers_by_its_end_as_a_list_of_one_does():
    for option in ("target_modules", "exclude_modules"):
        for name in ("q_proj", "self_attn.q_proj"):
            assert getattr(LoRA(**{option: name}), option) == [name]
        assert getattr(LoRA(**{option: r".*\.q_proj"}), option) == r".*\.q_proj"
    assert LoRA(target_modules="all-linear").target_modules == "all-linear"
    assert {name.rpartition(".")[2] for name in adapted_policy(target_modules="q_proj").adapters.layers} == {"q_proj"}
    with pytest.raises(
        UserError, match=r"lora.target_modules: q\|v is read as a regular expression of whole names and"
    ):
        adapted_policy(target_modules="q|v")
