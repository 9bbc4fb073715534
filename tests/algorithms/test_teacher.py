"""A frozen model beside the policy, and divergences as a YAML chooses them."""

import pytest
import torch

from lit_rlhf import DPO, PPO, LoRA, OnPolicyDistillation, UserError
from lit_rlhf.algorithms.chosen import ChosenFunction
from lit_rlhf.algorithms.teacher import chosen_divergence
from lit_rlhf.engine.packing import pack
from lit_rlhf.losses import forward_kl, generalized_jensen_shannon, policy_gradient_loss
from lit_rlhf.models.loading import load_policy
from lit_rlhf.models.roles import SameBase
from tests.models.test_adapter_folders import pytestmark, save_adapter
from tests.tiny import random_examples, save_tiny

__all__ = ["pytestmark"]


def test_a_named_reference_is_held_beside_the_policy_and_is_not_what_the_policy_was(folder, tmp_path):
    torch.manual_seed(3)
    other = save_tiny(tmp_path / "other", seed=3)
    module = PPO(str(folder), reference=str(other))
    held, policy = module.reference.network, module.policy
    assert module.frozen["reference"] is held and not any(p.requires_grad for p in held.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(held.parameters(), policy.parameters(), strict=True))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two adapters on one base."""
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / str(seed), folder, seed=seed, spread=0.3) for seed in (1, 2)]


@pytest.mark.parametrize("make", [PPO, DPO])
def test_a_reference_named_on_the_policys_base_is_held_there_and_is_what_it_is_alone(make, folder, adapters):
    batch, (ours, theirs) = pack(random_examples(3)), map(str, adapters)
    for policy, reference in ((ours, theirs), (str(folder), theirs), (ours, str(folder))):
        module = make(policy, reference=reference, lora=LoRA(r=2))
        view = module.views()["reference"]
        assert "reference" not in module.frozen and isinstance(view, SameBase)
        alone = load_policy(reference)
        assert torch.equal(view(batch)[0], alone(batch)[0]) and not torch.equal(module.policy(batch)[0], view(batch)[0])
    apart = make(policy, reference=reference, lora=LoRA(r=2), hold_reference="copy")
    assert "reference" in apart.frozen and torch.equal(apart.views()["reference"](batch)[0], view(batch)[0])


def test_a_reference_on_other_weights_than_the_policys_base_is_a_model_of_its_own(folder, adapters, tmp_path):
    ours, theirs = map(str, adapters)
    assert "reference" in PPO(str(folder), reference=theirs).frozen  # all weights learn
    assert "reference" in PPO(ours, reference=str(folder), lora=LoRA(r=2), merge_start=True).frozen
    other = str(save_tiny(tmp_path / "other", seed=3))
    with pytest.raises(UserError, match=r"^model\.reference: hold_reference: base is for the very base of the policy"):
        PPO(ours, reference=other, lora=LoRA(r=2), hold_reference="base")


def test_a_teacher_is_a_model_of_its_own_on_any_base(folder, adapters):
    assert "reference" in OnPolicyDistillation(str(folder), str(adapters[0]), lora=LoRA(r=2)).frozen


def test_options_reach_the_divergence():
    p, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    chosen = chosen_divergence(ChosenFunction(generalized_jensen_shannon, {"teacher_share": 0.1}))
    assert torch.equal(chosen(p, q), generalized_jensen_shannon(p, q, 0.1))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (ChosenFunction(forward_kl, {"beta": 1.0}), r"^forward_kl would ignore beta \(1\.0\)"),
        (ChosenFunction(policy_gradient_loss), "^policy_gradient_loss "),
        (
            ChosenFunction(lambda p, q: q.sum()),
            r"must give one divergence per token, \(M,\); for two tokens it gave \(\)",
        ),
        (ChosenFunction(lambda p, q: p.sum(-1)), "not finite, or have no gradient by the student"),
        (ChosenFunction(generalized_jensen_shannon, {"teacher_share": 2.0}), r"teacher_share \(2\.0\) must be between"),
    ],
)
def test_what_is_no_divergence_is_refused_in_a_line(chosen, message):
    with pytest.raises(UserError, match=message):
        chosen_divergence(chosen)
