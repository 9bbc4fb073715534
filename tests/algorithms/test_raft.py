"""RAFT: the best completion of each prompt is imitated."""

import pytest
import torch

from lit_rlhf import RAFT, LoRA, UserError
from lit_rlhf.losses import best_of_group, policy_gradient_loss
from tests.ppo_runs import count_w9, make, record, solved


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    assert solved(folder, tmp_path, RAFT, iterations=16, ppo_epochs=2) > 0.9


def test_defaults(folder):
    module = RAFT(str(folder))
    assert module.advantages.func is best_of_group and module.loss.func is policy_gradient_loss
    assert module.kl.kl_coef == 0 and not module.whiten_advantages


def test_one_completion_of_a_prompt_is_refused(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=RAFT)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): best_of_group compares .* 2 or more are needed$"):
        trainer.fit(module, data)


def test_the_loss_is_that_of_sft_on_the_best_of_each_group(folder, tmp_path):
    """Of 16 episodes in groups of 4 the 4 best are learnt from, each token alike; an adapter learns as well."""
    module = record(
        folder, tmp_path, kind=RAFT, lora=LoRA(r=4), num_minibatches=2, data={"group_size": 4, "max_tokens": 40}
    )
    batches = [batch for batch, _ in module.seen]
    assert sum(batch.packed.num_sequences for batch in batches) == 4
    assert all((batch.advantages == 1).all() for batch in batches)
    parts = module.trainer.datamodule.minibatches().micro_batches
    tokens = sum(len(batch.advantages) for batch in batches)
    shares = sum(len(batch.advantages) / (batch.denominator.item() * parts) for batch in batches)
    assert shares == pytest.approx(2) and tokens > 4  # two steps, in each the mean over its tokens

    texts = [
        module.tokenizer.decode(ids, skip_special_tokens=True)
        for ids in module.trainer.train_dataloader.experience.response_ids
    ]
    best = torch.tensor(count_w9([], texts)).mean().item()
    assert best == pytest.approx(module.rollout_metrics["rollout/best_score"])
    assert best > module.rollout_metrics["rollout/score"]
