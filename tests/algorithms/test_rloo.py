"""RLOO: REINFORCE over the other completions of a prompt."""

import pytest
import torch

from lit_rlhf import RLOO, FixedKL, UserError
from lit_rlhf.losses import policy_gradient_loss, rloo
from tests.ppo_runs import make, record, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, RLOO) > 0.9


def test_defaults(folder):
    module = RLOO(str(folder))
    assert module.advantages.func is rloo and module.loss.func is policy_gradient_loss
    assert not module.whiten_advantages and module.kl_penalty.place == "reward"


def test_one_completion_of_a_prompt_is_refused_before_anything_is_played(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("lit_rlhf.rollout.play.play", lambda *a, **k: pytest.fail("it was played"))
    module, data, trainer = make(folder, tmp_path, kind=RLOO)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): rloo compares [^\n]*: 2 or more are needed$"):
        trainer.fit(module, data)


def test_advantages_of_a_group_add_up_to_nothing_on_the_tokens_of_its_responses(folder, tmp_path):
    data = {"group_size": 4}
    module = record(folder, tmp_path, kind=RLOO, kl=FixedKL(0.0), data=data)
    (batch, _), *_ = module.seen
    ids = batch.packed.sequence_ids
    first = torch.diff(ids, prepend=torch.tensor([-1])) != 0
    assert torch.equal(batch.advantages, batch.advantages[first][ids])  # one for a whole response
    groups = batch.advantages[first].view(4, 4)  # the k-th responses of four prompts
    torch.testing.assert_close(groups.sum(0), torch.zeros(4), atol=1e-5, rtol=0)
    assert (groups != 0).any()
