"""GRPO, and DAPO, GSPO and CISPO as options of it."""

import pytest
import torch

from lit_rlhf import GRPO, FixedKL, KLPenalty, LoRA, UserError
from lit_rlhf.losses import cispo_policy_loss, grpo, gspo_policy_loss, ppo_policy_loss
from tests.ppo_runs import constant, make, record, solved

OPTIONS = {
    "GRPO": {},
    "DAPO": {"clip_range_high": 0.28, "loss_average": "tokens", "num_minibatches": 2},
    "GSPO": {"loss": gspo_policy_loss, "clip_range": 0.03, "clip_range_high": 0.04, "num_minibatches": 2},
    "CISPO": {"loss": cispo_policy_loss, "loss_average": "tokens", "num_minibatches": 2},
}


@pytest.mark.parametrize("name", ["GRPO", *(pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS if n != "GRPO")])
def test_it_and_its_options_learn_to_write_the_rewarded_token(name, folder, tmp_path):
    assert solved(folder, tmp_path, GRPO, **OPTIONS[name]) > 0.85


def test_defaults(folder):
    module = GRPO(str(folder))
    assert module.advantages.func is grpo and module.loss.func is ppo_policy_loss and module.loss.keywords == {}
    assert module.updates.loss_average == "responses" and not module.whiten_advantages
    assert module.kl_penalty == KLPenalty("loss", "k3")


def test_a_loss_keeps_its_own_clip_range_unless_another_is_asked_for(folder):
    assert GRPO(str(folder), loss=gspo_policy_loss).loss.keywords == {}
    assert GRPO(str(folder), loss=gspo_policy_loss, clip_range=0.1).loss.keywords == {"clip_range": 0.1}
    with pytest.raises(UserError, match=r"cispo_policy_loss would ignore clip_range \(0.2\): it takes"):
        GRPO(str(folder), loss=cispo_policy_loss, clip_range=0.2)
    with pytest.raises(UserError, match=r"clip_range_high \(-1.0\) must be more than 0"):
        GRPO(str(folder), clip_range_high=-1.0)


def test_one_completion_of_a_prompt_is_refused(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=GRPO)
    with pytest.raises(UserError, match=r"^data\.group_size \(1\): grpo compares .* 2 or more are needed$"):
        trainer.fit(module, data)


def test_groups_of_equal_rewards_teach_nothing_are_counted_and_give_no_nan(folder, tmp_path):
    module, data, trainer = make(
        folder, tmp_path, reward=constant, kind=GRPO, kl=FixedKL(0.0), data={"group_size": 4}, weight_decay=0.0
    )
    before = [p.clone() for p in module.policy.parameters()]
    trainer.fit(module, data)
    assert module.rollout_metrics["rollout/equal_groups"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, module.policy.parameters(), strict=True))


def test_each_response_weighs_the_same_however_long(folder, tmp_path):
    """The loss of a step is a mean over responses of means over their tokens, whatever the micro-batches."""
    for max_tokens in (None, 40):
        module = record(
            folder,
            tmp_path,
            kind=GRPO,
            kl=FixedKL(0.0),
            num_minibatches=2,
            data={"group_size": 4, "max_tokens": max_tokens},
        )
        parts = module.trainer.datamodule.minibatches().micro_batches
        batches = [batch for batch, _ in module.seen]
        lengths = torch.cat([batch.packed.response_lengths[batch.packed.sequence_ids] for batch in batches])
        shares = torch.cat([batch.weights / (batch.denominator * parts) for batch in batches])
        torch.testing.assert_close(shares, 1 / lengths / 8)  # 8 responses a step
        assert len(set(lengths.tolist())) > 1


def test_an_adapter_learns_on_one_base_with_the_reference(folder, tmp_path):
    module, data, trainer = make(folder, tmp_path, kind=GRPO, lora=LoRA(r=4), data={"group_size": 4})
    before = {name: p.clone() for name, p in module.policy.named_parameters()}
    trainer.fit(module, data)
    moved = {name for name, p in module.policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert len(list(module.networks())) == 1
