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
