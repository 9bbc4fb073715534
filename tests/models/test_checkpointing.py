import copy

import pytest
import torch
from transformers import BloomConfig, MixtralConfig

from lit_rlhf import LoRA, UserError
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.decoding import make_decoder
from lit_rlhf.models.policy import Policy, Scorer
from lit_rlhf.models.probe import choose_attention, disable_dropout
from lit_rlhf.models.roles import add_critic
from tests.models.adapted import adapted_policy, move
from tests.models.test_adapter_folders import pytestmark
from tests.tiny import ARCHITECTURES, SHAPE, random_examples, spread_model, tiny_policy

__all__ = ["pytestmark"]


def gradients(network, loss, seed=3):
    """Of every weight that learns, by name."""
    torch.manual_seed(seed)  # of dropout
    network.zero_grad()
    loss(network).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def twins(network):
    """The network, and a copy of it that computes blocks twice."""
    other = copy.deepcopy(network)
    other.checkpoint_activations()
    return network.train(), other.train()


def nll(policy):
    return policy.nll(pack(random_examples(6)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_the_same_to_the_bit(architecture):
    plain, twice = twins(tiny_policy(architecture))
    expected, found = gradients(plain, nll), gradients(twice, nll)
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_dropout_of_adapters_is_the_same_in_both_passes():
    plain, twice = twins(adapted_policy(dropout=0.3))
    expected, found = gradients(plain, nll), gradients(twice, nll)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    other = gradients(twice, nll, seed=4)
    assert any(not torch.equal(other[name], expected[name]) for name in expected)


def test_each_block_is_computed_again_with_the_adapters_of_its_first_pass():
    """PPO's loss: one backward pass through the policy, its reference without adapters, and the critic on its trunk."""
    policy = adapted_policy()
    add_critic(policy, "adapter", LoRA(r=2), None)
    move(policy, "critic", seed=2)
    batch = pack(random_examples(6))

    def loss(policy):
        logprobs, _ = policy(batch)
        values = policy.score(batch, batch.predictors, "critic")
        with torch.no_grad():
            reference, _ = policy(batch, adapters=())
        return ((logprobs - reference) * values).sum()

    plain, twice = twins(policy)
    expected, found = gradients(plain, loss), gradients(twice, loss)
    assert any("critic" in name for name in expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved(network, loss):
    """Bytes of what is kept for the backward pass, weights left out."""
    own, kept = {p.untyped_storage().data_ptr() for p in network.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss(network)
    return sum(kept.values())


def test_blocks_keep_their_inputs_alone():
    batch = pack(random_examples(40))

    def states(policy):
        return policy.score(batch, batch.predictors, "critic").sum()

    policy = adapted_policy()
    add_critic(policy, "head", None, None)
    plain, twice = twins(policy)
    assert saved(twice, states) < saved(plain, states) / 3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_decoding_keeps_its_cache_between_passes_that_learn(architecture):
    policy = tiny_policy(architecture)
    disable_dropout(policy)
    plain, twice = twins(policy)
    ids, lengths = torch.arange(24).reshape(2, 12).numpy() + 3, torch.tensor([4, 6]).numpy()
    found = []
    for policy in (plain, twice):
        decoder = make_decoder(policy, 2, 12, cuda_graphs=False)
        nll(policy)
        found.append([decoder.logits(ids, lengths + step) for step in range(3)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_models_that_cannot_are_refused():
    policy = Policy(spread_model(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4), "eager", 0))
    policy.model.supports_gradient_checkpointing = False
    with pytest.raises(UserError, match="activation_checkpointing: BloomForCausalLM has no blocks"):
        policy.checkpoint_activations()
    noisy = MixtralConfig(**SHAPE, num_key_value_heads=4, num_local_experts=2, router_jitter_noise=0.1)
    policy = Policy(spread_model(noisy, "eager", 0))
    choose_attention(policy, "noisy")
    with pytest.raises(UserError, match="MixtralForCausalLM stays in evaluation mode while it learns"):
        policy.checkpoint_activations()


def test_a_scorer_computes_blocks_twice_too():
    from lit_rlhf.models.loading import scorer_from_policy

    batch = pack(random_examples(6))
    plain, twice = twins(scorer_from_policy(tiny_policy()))
    assert isinstance(twice, Scorer) and twice.checkpointing.marked
    expected, found = (gradients(one, lambda s: s(batch, batch.last_nodes).sum()) for one in (plain, twice))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
