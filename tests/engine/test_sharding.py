"""FSDP2 on a mesh of one process; tests/algorithms/test_strategies.py trains on two."""

import copy

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from lit_rlhf.engine.packing import pack
from lit_rlhf.engine.sharding import full_state_dict, gathered, is_sharded, shard, total_norm
from tests.forked_ranks import group_of_one
from tests.tiny import random_examples, tiny_policy


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """One process by itself."""
    with group_of_one(tmp_path_factory.mktemp("process_group")) as mesh:
        yield mesh


@pytest.fixture
def plain():
    return tiny_policy()


@pytest.fixture
def sharded(plain, mesh):
    policy = copy.deepcopy(plain)
    shard(policy, mesh)
    return policy


def in_pieces(network):
    return [isinstance(parameter, DTensor) for parameter in network.parameters()]


def test_each_block_is_sharded_by_itself_and_the_rest_with_the_root(sharded, plain):
    blocks = sharded.model.model.layers
    assert is_sharded(sharded) and not is_sharded(plain)
    assert [module for module in sharded.modules() if isinstance(module, FSDPModule)] == [sharded, *blocks]
    assert all(in_pieces(sharded))


def test_a_network_is_sharded_once(sharded, mesh):
    before = list(sharded.parameters())
    shard(sharded, mesh)
    assert all(a is b for a, b in zip(before, sharded.parameters(), strict=True))


def test_shards_change_neither_logprobs_nor_gradients(sharded, plain):
    batch = pack(random_examples(4))
    logprobs = [policy(batch)[0] for policy in (sharded, plain)]
    torch.testing.assert_close(*logprobs)
    for each in logprobs:
        each.sum().backward()
    for (name, ours), theirs in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, msg=name)


def test_weights_are_whole_while_gathered_and_in_pieces_again_afterwards(sharded):
    with pytest.raises(KeyError, match="in the middle"), gathered(sharded):
        assert not any(in_pieces(sharded))
        raise KeyError("in the middle")
    assert all(in_pieces(sharded))


def test_weights_are_float32_in_pieces_and_bfloat16_where_they_are_gathered(plain, mesh):
    policy, batch = copy.deepcopy(plain), pack(random_examples(4))
    shard(policy, mesh, torch.bfloat16)
    with gathered(policy):
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (network.nll(batch) for network in (policy, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    norms = []
    for network, nll in ((policy, ours), (plain, theirs)):
        nll.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in network.parameters())
        norms.append(total_norm([parameter.grad for parameter in network.parameters()]))
    torch.testing.assert_close(*norms, rtol=0.01, atol=0)


def test_states_between_blocks_are_float32_as_under_autocast_alone(plain, mesh):
    policy, batch, seen = copy.deepcopy(plain), pack(random_examples(4)), []
    shard(policy, mesh, torch.bfloat16)
    for network in (policy, plain):
        network.model.model.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        with torch.autocast("cpu", torch.bfloat16):
            network(batch)
    assert seen[0].dtype == seen[1].dtype == torch.float32
    torch.testing.assert_close(*seen, rtol=0, atol=0.02)


def test_a_network_that_is_not_sharded_is_gathered_as_it_is(plain):
    before = list(plain.parameters())
    with gathered(plain):
        assert all(a is b for a, b in zip(before, plain.parameters(), strict=True))


def test_whole_weights_have_the_names_and_values_of_a_network_never_sharded(sharded, plain):
    ours, theirs = full_state_dict(sharded), full_state_dict(plain)
    assert ours.keys() == theirs.keys() == plain.state_dict().keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not any(isinstance(tensor, DTensor) or tensor.requires_grad for tensor in ours.values())


def test_the_norm_is_that_of_all_gradients_as_one_vector(sharded, plain):
    assert total_norm([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]).item() == 5.0
    batch = pack(random_examples(4))
    norms = []
    for policy in (sharded, plain):
        policy.nll(batch).backward()
        norms.append(total_norm([parameter.grad for parameter in policy.parameters()]))
    assert not isinstance(norms[0], DTensor)
    torch.testing.assert_close(*norms)
