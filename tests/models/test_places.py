import pytest

from lit_rlhf.models.adapters import Adapters, LoRA
from lit_rlhf.models.places import parameters_of, place_of
from lit_rlhf.models.roles import add_critic, reference_of
from tests.tiny import tiny_policy


def adapted():
    policy = tiny_policy()
    policy.adapters = Adapters(policy.model, "base")
    policy.adapters.add("policy", LoRA(r=2).config("base", "CAUSAL_LM"))
    policy.active = ("policy",)
    return policy


def test_views_on_the_policys_base_say_so_and_bring_their_own_parameters_alone():
    policy = adapted()
    critic = add_critic(policy, "adapter", LoRA(r=2), None)
    theirs = {id(p) for p in parameters_of(critic)}
    assert (place_of(policy), place_of(critic)) == ("adapter, own base", "adapter, policy's base")
    assert theirs and not theirs & {id(p) for p in parameters_of(policy)}
    assert {id(p) for p in parameters_of(policy)} | theirs == {id(p) for p in policy.parameters()}


@pytest.mark.parametrize(("hold", "place"), [("copy", "own model, frozen"), ("parked", "own model, parked")])
def test_a_copy_says_where_it_waits(hold, place):
    policy = tiny_policy()
    reference = reference_of(policy, {}, hold)
    assert place_of(reference) == place
    assert len(list(parameters_of(reference))) == len(list(policy.parameters()))


def test_a_head_on_the_trunk_is_one_matrix():
    policy = tiny_policy()
    critic = add_critic(policy, "head", None, None)
    assert place_of(critic) == "head on policy's trunk"
    assert [tuple(p.shape) for p in parameters_of(critic)] == [(1, 32)]


def test_what_is_no_network_says_itself_what_it_is():
    assert place_of("Python") == "Python"
    assert list(parameters_of("Python")) == []
