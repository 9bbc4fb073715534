"""Where the reference of DPO lives; KTO stands on the same base."""

import pytest
import torch

from lit_rlhf import DPO, UserError
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.losses import ipo_loss
from lit_rlhf.models.loading import load_policy_with_tokenizer
from tests.algorithms.watched import watch

CONTRADICTIONS = {
    "cache_reference and reference_update": {"cache_reference": True, "reference_update": ReferenceUpdate()},
    "reference_free and reference_update": {"reference_free": True, "reference_update": ReferenceUpdate()},
    "reference_free and cache_reference": {"reference_free": True, "cache_reference": True},
    "reference_free and reference": {"reference_free": True, "reference": "elsewhere"},
    "cache_reference and reference": {"cache_reference": True, "reference": "elsewhere"},
}


@pytest.mark.parametrize("pair", CONTRADICTIONS)
def test_options_that_contradict_each_other_are_refused_by_both_names(pair, inputs):
    with pytest.raises(UserError) as error:
        DPO(str(inputs / "model"), **CONTRADICTIONS[pair])
    assert all(name in str(error.value) for name in pair.split(" and "))


def test_the_default_reference_is_the_policy_in_memory_not_what_the_config_names(inputs, monkeypatch):
    loaded = []

    def load_and_move(name, *args, **kwargs):
        loaded.append(name)
        policy, tokenizer = load_policy_with_tokenizer(name, *args, **kwargs)
        with torch.no_grad():
            next(policy.parameters()).add_(1.0)  # so that memory and disk differ
        return policy, tokenizer

    monkeypatch.setattr("lit_rlhf.algorithms.referenced.load_policy_with_tokenizer", load_and_move)
    module = DPO(str(inputs / "model"), loss=ipo_loss)
    held, trained = module.frozen["reference"], module.policy
    assert len(loaded) == 1
    assert all(torch.equal(a, b) for a, b in zip(held.parameters(), trained.parameters(), strict=True))
    with torch.no_grad():
        next(trained.parameters()).add_(1.0)
    assert not torch.equal(next(held.parameters()), next(trained.parameters()))  # a copy, not the same memory


def test_cached_and_live_reference_give_the_same_losses(inputs, tmp_path):
    live, cached = (watch("dpo", inputs, tmp_path, cache_reference=cache).losses for cache in (False, True))
    assert cached == pytest.approx(live, abs=1e-5)
