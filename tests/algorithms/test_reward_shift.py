import pytest
import torch

from lit_rlhf import DPO
from lit_rlhf.algorithms.reward_shift import RewardShift
from lit_rlhf.losses import bco_pair_loss
from tests.algorithms.dpo_runs import fit
from tests.stages import make_stage, make_trainer


def test_bco_shifts_by_the_mean_implicit_reward_of_the_pairs_before(inputs, tmp_path):
    module, _ = fit(inputs, tmp_path, max_steps=1, loss=bco_pair_loss)
    shift = module.loss.shift
    assert shift.mean.item() == 0 and shift.pairs_seen.item() > 0  # the first rewards are those of π_ref
    shifts, rewards = [], []

    class Recorder(RewardShift):
        def update(self, sum_over_ranks):
            shifts.append(self.mean.item())
            rewards.append(torch.cat(self.step_rewards).tolist())
            super().update(sum_over_ranks)

    _, data = make_stage("dpo", inputs)
    recorder = DPO(str(inputs / "model"), loss=bco_pair_loss, learning_rate=1e-2)
    recorder.loss.shift = Recorder()
    make_trainer(tmp_path, max_epochs=1).fit(recorder, data)
    seen = [reward for batch in rewards[:-1] for reward in batch]
    assert shifts[-1] == pytest.approx(sum(seen) / len(seen), rel=1e-4)
    assert abs(shifts[-1]) > 1e-4


def test_the_shift_of_a_step_is_the_mean_over_all_pairs_of_the_steps_before():
    shift, seen = RewardShift(), []
    for step in ([[1.0, 2.0], [6.0]], [[-4.0]], [[0.5, 0.5, 0.5, 2.5]]):  # of micro-batches
        for rewards in step:
            assert shift.mean.item() == pytest.approx(sum(seen) / max(len(seen), 1))  # stays during the step
            shift.observe(torch.tensor(rewards))
        shift.update(lambda sums: sums)
        seen += [reward for rewards in step for reward in rewards]
    assert shift.mean.item() == pytest.approx(sum(seen) / len(seen)) and shift.pairs_seen.item() == len(seen) == 8


def test_the_pairs_of_all_ranks_count_alike():
    shift = RewardShift()
    shift.observe(torch.tensor([1.0, 3.0]))
    shift.update(lambda sums: sums + torch.tensor([8.0, 2.0]))  # of another rank: two pairs of mean 4
    assert (shift.mean.item(), shift.pairs_seen.item()) == (3.0, 4.0)


def test_a_restored_shift_goes_on_from_its_mean_and_its_weight():
    first, second = RewardShift(), RewardShift()
    first.observe(torch.tensor([2.0, 4.0]))
    first.update(lambda sums: sums)
    second.load_state_dict(first.state_dict())
    second.observe(torch.tensor([9.0]))
    second.update(lambda sums: sums)
    assert second.mean.item() == 5.0 and second.pairs_seen.item() == 3


def test_what_is_observed_keeps_no_graph():
    shift = RewardShift()
    shift.observe(torch.ones(2, requires_grad=True) * 2)
    assert not shift.step_rewards[0].requires_grad
