"""Dr. GRPO: neither divided by a standard deviation nor by a length."""

import pytest
import torch

from lit_rlhf import DrGRPO, FixedKL
from lit_rlhf.losses import dr_grpo, ppo_policy_loss
from tests.ppo_runs import record, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, DrGRPO) > 0.9


def test_defaults(folder):
    module = DrGRPO(str(folder))
    assert module.advantages.func is dr_grpo and module.loss.func is ppo_policy_loss
    assert module.updates.loss_average == "max_new_tokens" and not module.whiten_advantages


def test_each_token_weighs_the_same_however_long_its_response_and_whoever_is_in_the_step(folder, tmp_path):
    module = record(folder, tmp_path, kind=DrGRPO, kl=FixedKL(0.0), num_minibatches=2, data={"group_size": 4})
    for batch, _ in module.seen:
        shares = batch.weights / batch.denominator
        torch.testing.assert_close(shares, torch.full_like(shares, 1 / (8 * 8)))  # 8 responses of up to 8 tokens
