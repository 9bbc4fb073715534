"""SimPO, CPO and ORPO through the Trainer: no reference anywhere, whatever is learnt."""

from dataclasses import replace

import pytest
import torch

from lit_rlhf import LoRA, UserError
from lit_rlhf.algorithms.preference import sequence_logprobs
from tests.algorithms.dpo_runs import Watch
from tests.algorithms.watched import watch
from tests.stages import REFERENCE_FREE, make_stage, make_trainer

every = pytest.mark.parametrize("stage", REFERENCE_FREE)


@every
def test_no_reference_is_held_and_the_first_loss_is_that_of_the_policys_own_log_probs(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs, warmup_steps=0)
    assert not module.frozen and set(module.views()) == {"policy"}
    seen = Watch()
    make_trainer(tmp_path, max_epochs=1, callbacks=[seen]).fit(module, data)
    start, _ = make_stage(stage, inputs)
    packed = seen.batches[0].packed
    logprobs, lengths = sequence_logprobs(start.policy, packed), packed.response_lengths.chunk(2)
    assert seen.losses[0] == pytest.approx(start.losses_of(*logprobs, *lengths).mean().item(), rel=1e-5)
    assert len(set(seen.losses)) > 2


@every
def test_pairs_are_learnt_and_what_they_imply_is_logged(stage, inputs, tmp_path):
    module, data = make_stage(stage, inputs)
    trainer = make_trainer(tmp_path, max_epochs=3, limit_val_batches=1.0)
    start = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    metrics = trainer.callback_metrics
    names = {"reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward"}
    assert {f"{prefix}/{name}" for prefix in (stage, "val") for name in names} <= set(metrics)
    assert metrics["val/reward_margin"] > start["val/reward_margin"] and metrics["val/loss"] < start["val/loss"]


def test_the_gradient_of_a_step_does_not_depend_on_its_split_into_micro_batches(inputs, tmp_path):
    gradients = []
    for budget in (100, 10_000):
        seen = watch("orpo", inputs, tmp_path, {"max_tokens": budget}, {"accumulate_grad_batches": 100})
        gradients.append(torch.cat([gradient.flatten() for gradient in seen.gradients.values()]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_an_adapter_learns_alone(inputs, tmp_path):
    module, data = make_stage("simpo", inputs, lora=LoRA(r=4))
    data.batches = replace(data.batches, max_tokens=10_000)
    make_trainer(tmp_path, max_epochs=1).fit(module, data)
    assert all("lora" in name for name, parameter in module.named_parameters() if parameter.requires_grad)


OUT_OF_RANGE = [
    ("simpo", "beta"),
    ("cpo", "beta"),
    ("orpo", "odds_coef"),
    ("simpo", "target_margin"),
    ("cpo", "nll_coef"),
]


@pytest.mark.parametrize(("stage", "option"), OUT_OF_RANGE)
def test_settings_that_are_none_are_refused_by_name(stage, option, inputs):
    with pytest.raises(UserError, match=rf"{option} \(-1.0\) must be"):
        REFERENCE_FREE[stage](str(inputs / "model"), **{option: -1.0})


def test_their_losses_are_no_loss_of_dpo_which_says_what_to_take(inputs):
    from lit_rlhf import DPO, losses

    for name, other in (("simpo_loss", "SimPO"), ("cpo_loss", "CPO"), ("orpo_loss", "ORPO")):
        with pytest.raises(UserError, match=f"{name} knows no reference: set model.class_path: lit_rlhf.{other}"):
            DPO(str(inputs / "model"), loss=getattr(losses, name))
