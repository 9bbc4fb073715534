"""A frozen model beside the policy, and divergences as a YAML chooses them."""

import pytest
import torch

from lit_rlhf import PPO, UserError
from lit_rlhf.algorithms.chosen import ChosenFunction
from lit_rlhf.algorithms.teacher import chosen_divergence
from lit_rlhf.losses import forward_kl, generalized_jensen_shannon, policy_gradient_loss
from tests.tiny import save_tiny


def test_a_named_reference_is_held_beside_the_policy_and_is_not_what_the_policy_was(folder, tmp_path):
    torch.manual_seed(3)
    other = save_tiny(tmp_path / "other", seed=3)
    module = PPO(str(folder), reference=str(other))
    held, policy = module.reference.network, module.policy
    assert module.frozen["reference"] is held and not any(p.requires_grad for p in held.parameters())
    assert any(not torch.equal(a, b) for a, b in zip(held.parameters(), policy.parameters(), strict=True))


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
