import contextlib
import copy

import pytest
import torch

from lit_rlhf import LoRA, UserError
from lit_rlhf.engine.packing import pack
from lit_rlhf.models.adapter_folders import saved_adapter
from lit_rlhf.models.loading import load_policy, load_scorer
from lit_rlhf.models.policy import freeze
from lit_rlhf.models.roles import (
    OwnModel,
    SameBase,
    add_critic,
    add_reward_model,
    critic_place,
    own_reference,
    policy_parameters,
    reference_of,
    shares_base,
)
from tests.models.adapted import move
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import random_examples, save_tiny

__all__ = ["pytestmark"]
BATCH = pack(random_examples(5))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two bases, an adapter of the first, and a reward model's."""
    root = tmp_path_factory.mktemp("roles")
    save_tiny(root / "base"), save_tiny(root / "other", seed=1)
    save_adapter(root / "adapter", root / "base")
    save_adapter(root / "scorer", root / "base", task="SEQ_CLS", seed=2)
    save_adapter(root / "other_scorer", root / "other", task="SEQ_CLS")
    return root


def storages(*modules):
    """The base tensors of networks, each once."""
    named = [pair for module in modules for pair in module.named_parameters()]
    return {p.untyped_storage().data_ptr() for name, p in named if ".lora_" not in name and "heads" not in name}


@pytest.mark.parametrize("start", ["base", "adapter"])
@pytest.mark.parametrize("lora", [None, LoRA(r=2)])
@pytest.mark.parametrize("hold", [None, "base", "copy", "parked"])
def test_the_reference_is_what_the_policy_was_wherever_it_lives(start, lora, hold, runs):
    if hold == "base" and start == "base" and lora is None:
        with pytest.raises(UserError, match="hold_reference: base needs a base that stays"):
            reference_of(load_policy(runs / start), {}, hold)
        return
    policy, frozen = load_policy(runs / start, lora=lora), {}
    expected = freeze(load_policy(runs / start))(BATCH)[0]
    reference = reference_of(policy, frozen, hold)
    with torch.no_grad():
        for parameter in policy_parameters(policy):
            if parameter.requires_grad:
                parameter += 0.1
        assert torch.equal(reference(BATCH)[0], expected)
        assert not torch.allclose(policy(BATCH)[0], expected, atol=1e-2)
    assert (reference(BATCH)[1] is None and not reference(BATCH)[0].requires_grad) or isinstance(reference, SameBase)
    on_base = hold in (None, "base") and (start, lora) != ("base", None)
    assert isinstance(reference, SameBase if on_base else OwnModel) and bool(frozen) != on_base
    if on_base:
        assert storages(policy) == storages(policy, reference.policy) and len(storages(policy)) == 20


def test_another_adapter_on_the_same_base_is_a_reference_there(runs):
    policy = load_policy(runs / "base", lora=LoRA())
    reference = reference_of(policy, {}, None, saved=saved_adapter(runs / "adapter"))
    assert isinstance(reference, SameBase)
    assert torch.equal(reference(BATCH)[0], load_policy(runs / "adapter")(BATCH)[0])


class Far(OwnModel):
    """A network whose moves are seen, since a CPU is always where the network is."""

    def watch(self):
        self.moves, to = [], self.network.to
        self.network.to = lambda **place: self.moves.append(place["device"]) or to(**place)
        return self


def test_a_reward_models_adapter_is_no_reference(runs):
    with pytest.raises(UserError, match=r"scorer holds a reward model \(an adapter for SEQ_CLS\), not a policy"):
        reference_of(load_policy(runs / "adapter"), {}, None, saved=saved_adapter(runs / "scorer"))


def test_a_parked_network_is_moved_there_and_back_once_for_all_that_stands_between(runs, monkeypatch):
    policy = load_policy(runs / "base")
    reference = Far(copy.deepcopy(policy), policy, parked=True).watch()
    policy.double()  # stands in for another device: so the network has to move
    with torch.no_grad(), reference.at_hand():
        reference(BATCH), reference(BATCH)
        assert [str(place) for place in reference.moves] == ["cpu"]
    assert next(reference.network.parameters()).dtype == torch.float64
    kept = own_reference(load_policy(runs / "base"), policy, frozen := {}, "parked")
    assert kept.parked and frozen["reference"] is kept.network
    with pytest.raises(UserError, match="hold_reference: base is for the very base of the policy"):
        own_reference(load_policy(runs / "base"), policy, {}, "base")


@pytest.mark.parametrize(
    ("policy", "lora", "hold", "critic", "place"),
    [
        ("base", None, None, None, "model"),
        ("base", None, "head", None, "head"),
        ("base", None, "adapter", None, "here all weights learn: set lora"),
        ("base", LoRA(), None, None, "adapter"),
        ("adapter", None, None, None, "adapter"),
        ("base", LoRA(), "model", None, "model"),
        ("base", LoRA(), None, "scorer", "adapter"),
        ("adapter", LoRA(), None, "scorer", "adapter"),
        ("base", None, None, "scorer", "model"),
        ("base", LoRA(), None, "other_scorer", "model"),
        ("base", LoRA(), "adapter", "other_scorer", "other_scorer stands on .*other, the policy on .*base"),
        ("base", LoRA(), "head", "scorer", "scorer would have no say"),
    ],
)
def test_where_the_critic_lives(policy, lora, hold, critic, place, runs):
    network = load_policy(runs / policy, lora=lora)
    saved = None if critic is None else saved_adapter(runs / critic)
    name = None if critic is None else str(runs / critic)
    if " " in place:
        with pytest.raises(UserError, match=place):
            critic_place(network, hold, name, saved)
    else:
        assert critic_place(network, hold, name, saved) == place


def test_a_critic_on_the_base_is_the_reward_model_that_it_starts_from(runs):
    policy, expected = load_policy(runs / "adapter", lora=LoRA(r=2)), load_scorer(runs / "scorer")
    critic = add_critic(policy, "adapter", LoRA(r=2), saved_adapter(runs / "scorer"))
    nodes = BATCH.predictors
    torch.testing.assert_close(critic(BATCH, nodes), expected(BATCH, nodes), rtol=1e-5, atol=1e-5)
    before = policy(BATCH)[0]
    move(policy, "critic")
    assert torch.equal(policy(BATCH)[0], before)


@pytest.mark.parametrize(("start", "lora"), [("base", LoRA(r=2)), ("adapter", LoRA(r=2)), ("adapter", None)])
def test_a_fresh_critic_stands_on_the_policys_trunk_as_it_was(start, lora, runs):
    policy = load_policy(runs / start, lora=lora)
    critic = add_critic(policy, "adapter", lora, None)
    expected = load_scorer(runs / start, fresh_head=True)
    with torch.no_grad():
        expected.model.score.weight.copy_(policy.heads["critic"].linear.weight)
    nodes = BATCH.predictors
    move(policy, "policy")
    torch.testing.assert_close(critic(BATCH, nodes), expected(BATCH, nodes), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(r=2, target_modules=["q_proj", "lm_head"])])
def test_policy_and_critic_learn_their_own_weights_alone(lora, runs):
    policy = load_policy(runs / "base", lora=lora)
    critic = add_critic(policy, "adapter" if lora else "head", lora, None)
    own, theirs = {id(p) for p in policy_parameters(policy)}, {id(p) for p in critic.parameters()}
    assert not own & theirs
    critic(BATCH, BATCH.predictors).sum().backward()
    reached = {id(p) for p in policy.parameters() if p.grad is not None}
    assert theirs <= reached
    assert (reached == theirs) == (lora is not None)  # a head on the trunk reaches the policy, too
    policy(BATCH)[0].sum().backward()
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)  # as DDP asks for


@pytest.mark.parametrize("head", [["lm_head"], ".*lm_head"])
def test_a_critic_has_no_adapter_of_the_language_models_head(head, runs):
    policy = load_policy(runs / "base", lora=(lora := LoRA(target_modules=head)))
    with pytest.raises(UserError, match=r"lora.target_modules .* more than the head"):
        add_critic(policy, "adapter", lora, None)


def test_a_reward_model_on_the_base_is_that_reward_model_for_good(runs):
    policy, expected = load_policy(runs / "base", lora=LoRA()), load_scorer(runs / "scorer")
    saved = saved_adapter(runs / "scorer")
    assert shares_base(policy, saved) and not shares_base(policy, saved_adapter(runs / "other_scorer"))
    assert not shares_base(load_policy(runs / "base"), saved) and not shares_base(policy, None)
    assert not shares_base(load_policy(runs / "adapter", lora=LoRA(), merge_start=True), saved)
    reward = add_reward_model(policy, saved)
    torch.testing.assert_close(reward(BATCH, BATCH.last_nodes), expected(BATCH, BATCH.last_nodes), rtol=1e-5, atol=1e-5)
    assert not any(p.requires_grad for p in reward.parameters())
    assert reward.model is policy.model
    assert not any("reward" in name for name in policy.state_dict())


def passes(policy, monkeypatch):
    """Counts the passes of its trunk."""
    counted, trunk = [], policy.model.model.forward
    monkeypatch.setattr(
        policy.model.model, "forward", lambda *args, **kwargs: counted.append(1) or trunk(*args, **kwargs)
    )
    return counted


@pytest.mark.parametrize(
    ("lora", "hold", "needed"), [(None, "head", 1), (LoRA(r=2), "head", 1), (LoRA(r=2), "adapter", 2)]
)
def test_roles_that_read_the_same_states_share_a_pass_and_give_the_numbers_and_gradients_of_their_own(
    lora, hold, needed, runs, monkeypatch
):
    policy = load_policy(runs / "base", lora=lora)
    critic = add_critic(policy, hold, lora, None)
    counted, outcomes = passes(policy, monkeypatch), []
    for share in (False, True):
        policy.zero_grad()
        del counted[:]
        with policy.shared_pass() if share else contextlib.nullcontext():
            values, logprobs = critic(BATCH, BATCH.predictors), policy(BATCH)[0]
        assert len(counted) == (needed if share else 2)
        (values.square().sum() + logprobs.sum()).backward()
        gradients = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        outcomes.append([values.detach(), logprobs.detach(), *gradients])
    for own, shared in zip(*outcomes, strict=True):
        assert (shared - own).norm() <= 1e-5 * own.norm()


def test_another_batch_or_a_later_pass_is_read_anew(runs, monkeypatch):
    policy, other = load_policy(runs / "base"), pack(random_examples(3))
    counted = passes(policy, monkeypatch)
    with torch.no_grad():
        expected = [policy(batch)[0] for batch in (BATCH, other)]
        with policy.shared_pass():
            for batch, logprobs in zip((BATCH, other), expected, strict=True):
                assert torch.equal(policy(batch)[0], logprobs) and torch.equal(policy(batch)[0], logprobs)
        policy(BATCH)
    assert len(counted) == 2 + 2 + 1 and policy.kept is None
