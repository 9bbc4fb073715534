"""The demo's gold reward is not asked about prompts that it knows nothing of."""

import numpy as np
import pytest

from lit_rlhf.data.batches import PromptBatch
from lit_rlhf.demo import gold_reward, rows
from lit_rlhf.demo.gold import is_question
from lit_rlhf.rollout.demo_monitor import leave_out_gold
from lit_rlhf.rollout.scoring import Rewards
from tests.stages import make_stage, make_trainer, share_of_w9

DEMO = [row["prompt"] for row in rows("prompts", "validation")[:20]]
OWN = ["What is the capital of France?", [{"role": "user", "content": "Write a poem."}]] * 10


def batch(prompts):
    return {"train": PromptBatch([np.zeros(1, dtype=np.int64)] * len(prompts), {"prompt": prompts})}


def test_the_gold_reward_knows_the_demos_prompts_and_no_others():
    assert all(map(is_question, DEMO)) and not any(map(is_question, OWN))


def test_on_other_prompts_the_gold_monitor_is_left_out_and_told():
    rewards = Rewards(share_of_w9, monitors={"gold": gold_reward, "again": share_of_w9})
    with pytest.warns(UserWarning, match="data.monitors.gold: lit_rlhf.demo.gold_reward judges answers to the demo"):
        leave_out_gold(rewards, batch(OWN))
    assert [term.name for term in rewards.terms] == ["reward", "again"]


@pytest.mark.parametrize(
    ("rewards", "prompts"),
    [(Rewards(share_of_w9, monitors={"gold": gold_reward}), DEMO), (Rewards(gold_reward), OWN)],
)
def test_on_the_demos_prompts_it_stays_and_where_it_is_learnt_from_it_is_the_users(rewards, prompts):
    before = [*rewards.terms]
    leave_out_gold(rewards, batch(prompts))
    assert rewards.terms == before


def test_a_run_on_other_prompts_has_no_gold_curve(inputs, tmp_path):
    module, data = make_stage("ppo", inputs)
    data.rewards = Rewards(share_of_w9, monitors={"gold": gold_reward})
    trainer = make_trainer(tmp_path, limit_val_batches=1)
    with pytest.warns(UserWarning, match="it is left out"):
        trainer.validate(module, data, verbose=False)
    assert "val/score" in trainer.callback_metrics and "val/gold" not in trainer.callback_metrics
