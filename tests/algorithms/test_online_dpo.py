"""Online DPO: pairs of the policy's own completions, which the reward of the data judges."""

import pytest
import torch

from lit_rlhf import LoRA, OnlineDPO, ReferenceUpdate, UserError
from lit_rlhf.losses import best_of_group, dpo_loss, ppo_policy_loss
from tests.ppo_runs import Logged, constant, count_w9, make, record

DATA = {"group_size": 4}


@pytest.mark.slow
def test_it_learns_to_write_the_rewarded_token(folder, tmp_path):
    module, data, trainer = make(
        folder,
        tmp_path,
        kind=OnlineDPO,
        beta=0.05,
        learning_rate=1e-2,
        trainer={"max_epochs": 16, "gradient_clip_val": 1.0},
        data={"rollout_size": 64, "num_slots": 32, "group_size": 4},
    )
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/score"] > 0.8


def test_the_loss_is_the_mean_of_dpos_over_the_pairs_whose_rewards_differ(folder, tmp_path):
    """The first step, by plain log-probs of best and worst; whatever the micro-batches."""
    for max_tokens in (None, 40):
        module = record(
            folder, tmp_path, kind=OnlineDPO, beta=0.3, data=DATA | {"max_tokens": max_tokens}, learning_rate=0.0
        )
        total, pairs = 0.0, 0
        for batch, logprobs in module.seen:
            sums = batch.packed.sum_by_sequence(logprobs - batch.ref_logprobs)
            chosen, rejected = sums.chunk(2)
            texts = [module.tokenizer.decode(ids, skip_special_tokens=True) for ids in responses(batch.packed)]
            scores = torch.tensor(count_w9([], texts)).view(2, -1)
            assert (scores[0] >= scores[1]).all()
            judged = scores[0] > scores[1]
            losses = dpo_loss(chosen, rejected, torch.zeros_like(chosen), torch.zeros_like(chosen), 0.3)
            parts = module.trainer.datamodule.minibatches().micro_batches
            total += (losses[judged].sum() / (batch.denominator * parts)).item()
            pairs += int(judged.sum())
        assert 0 < pairs < 4  # some tie
        assert total == pytest.approx(module.trainer.callback_metrics["train/loss"].item())
        assert pairs == 4 * (1 - module.rollout_metrics["rollout/equal_groups"])


def responses(packed):
    return [packed.target_ids[packed.sequence_ids == i] for i in range(packed.num_sequences)]


def test_groups_of_equal_rewards_are_counted_and_give_no_nan(folder, tmp_path):
    logged = Logged("train/loss")
    module, data, trainer = make(
        folder, tmp_path, reward=constant, kind=OnlineDPO, data=DATA, weight_decay=0.0, trainer={"callbacks": [logged]}
    )
    before = [p.clone() for p in module.policy.parameters()]
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/equal_groups"] == 1.0 and logged.values == [0.0]
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))


def test_a_hard_update_after_each_iteration_is_iterative_dpo(folder, tmp_path):
    update = ReferenceUpdate(alpha=1.0, every=2)
    module, data, trainer = make(
        folder, tmp_path, kind=OnlineDPO, data=DATA, num_minibatches=2, reference_update=update, learning_rate=1e-2
    )
    start = [p.clone() for p in module.policy.parameters()]
    trainer.fit(module, data)
    policy, reference = list(module.policy.parameters()), list(module.moving_reference.parameters())
    assert all(torch.equal(a, b) for a, b in zip(policy, reference, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(policy, start, strict=True))
    assert any("moving_reference" in name for name in module.state_dict())  # it is state
    with pytest.raises(UserError, match="reference_update moves whole weights, and here an adapter learns"):
        OnlineDPO(str(folder), reference_update=update, lora=LoRA(r=2))


def test_an_adapter_learns_on_one_base_with_the_reference(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=OnlineDPO, lora=LoRA(r=4), data=DATA, learning_rate=1e-2)
    before = {name: p.clone() for name, p in module.policy.named_parameters()}
    trainer.fit(module, data)
    moved = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert len(list(module.networks())) == 1


def test_what_does_not_fit_is_refused_in_a_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"^model\.loss: ppo_policy_loss "):
        OnlineDPO(str(folder), loss=ppo_policy_loss)
    with pytest.raises(UserError, match=r"^beta \(0\.0\) must be more than 0"):
        OnlineDPO(str(folder), beta=0.0)
    module, data, trainer = make(folder, tmp_path, kind=OnlineDPO)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): best_and_worst compares .* 2 or more are needed$"):
        trainer.fit(module, data)
    module, data, trainer = make(folder, tmp_path, kind=OnlineDPO, data=DATA | {"max_tokens": 12})
    with pytest.raises(UserError, match=r"which the loss compares, are 19 tokens, more than max_tokens \(12\) allows"):
        trainer.fit(module, data)


def test_another_judge_is_named(folder):
    assert OnlineDPO(str(folder), advantages=best_of_group).advantages.func is best_of_group
