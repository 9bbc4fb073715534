"""REINFORCE++: whitened rewards to go, clipped ratios."""

import pytest

from lit_rlhf import REINFORCEPlusPlus, UserError
from lit_rlhf.losses import ppo_policy_loss, reinforce_plus_plus
from tests.ppo_runs import make, record, solved


@pytest.mark.slow
@pytest.mark.parametrize("group_baseline", [False, True])
def test_it_learns_to_write_the_rewarded_token(group_baseline, folder, tmp_path):
    assert solved(folder, tmp_path, REINFORCEPlusPlus, group_baseline=group_baseline) > 0.9


def test_defaults(folder):
    module = REINFORCEPlusPlus(str(folder))
    assert module.advantages.func is reinforce_plus_plus and module.loss.func is ppo_policy_loss
    assert module.advantages.keywords == {"gamma": 1.0, "group_baseline": False} and module.whiten_advantages
    assert (module.updates.ppo_epochs, module.updates.num_minibatches) == (1, 4)


def test_advantages_are_whitened_over_the_whole_rollout(folder, tmp_path):
    module = record(folder, tmp_path, kind=REINFORCEPlusPlus, num_minibatches=1)
    ((batch, _),) = module.seen
    assert batch.advantages.mean().item() == pytest.approx(0, abs=1e-5)
    assert batch.advantages.var(correction=0).item() == pytest.approx(1, abs=1e-4)


def test_the_mean_of_a_group_needs_a_group(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=REINFORCEPlusPlus, group_baseline=True)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): .* with group_baseline compares .* 2 or more"):
        trainer.fit(module, data)
    module, data, trainer = make(folder, tmp_path, kind=REINFORCEPlusPlus)
    trainer.fit(module, data)  # which one completion will do for
