"""REINFORCE: the policy gradient over a running mean, without a critic."""

import pytest
import torch

from lit_rlhf import PPO, REINFORCE, UserError
from lit_rlhf.losses import gae, policy_gradient_loss, reinforce
from tests.ppo_runs import make, record, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, REINFORCE, iterations=20) > 0.9


def test_defaults(folder):
    module = REINFORCE(str(folder))
    assert module.advantages.func is reinforce and module.loss.func is policy_gradient_loss
    assert module.advantages.keywords == {"gamma": 1.0, "baseline": "running_mean"} and not module.whiten_advantages
    assert (module.updates.ppo_epochs, module.updates.num_minibatches) == (1, 1)


def test_the_baseline_is_the_mean_return_of_all_responses_of_the_run_so_far(folder, tmp_path):
    seen = []

    def watched(rollout, gamma, baseline):
        seen.append(rollout)
        return reinforce(rollout, gamma, baseline)

    make_run = make(folder, tmp_path, kind=REINFORCE, advantages=watched, trainer={"max_epochs": 3})
    module, data, trainer = make_run
    trainer.fit(module, data)
    returns = [rollout.token_rewards.double().sum(1) for rollout in seen[-3:]]
    for number, rollout in enumerate(seen[-3:]):
        assert rollout.running_mean.item() == pytest.approx(torch.cat(returns[: number + 1]).mean().item())


def test_without_a_baseline_advantages_are_the_reward_to_go(folder, tmp_path):
    module = record(folder, tmp_path, kind=REINFORCE, baseline="none")
    (batch, _), *_ = module.seen
    scores = batch.advantages[torch.diff(batch.packed.sequence_ids, append=torch.tensor([-1])) != 0]
    assert ((scores >= 0) & (scores <= 1)).all()  # at the last token, where no KL is left but its own, which is 0 yet


def test_a_critic_as_the_baseline_is_ppos(folder, tmp_path):
    with pytest.raises(UserError, match=r"baseline \('critic'\) must be none or running_mean"):
        REINFORCE(str(folder), baseline="critic")
    with pytest.raises(UserError, match=r"model\.advantages: gae needs the values of a critic"):
        REINFORCE(str(folder), advantages=gae)
    PPO(str(folder), advantages=lambda rollout: reinforce(rollout, baseline="critic"), loss=policy_gradient_loss)
