"""KTO through the Trainer: its reference point, its gradient, and what a step, a rank or a cache may not change."""

import json
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from lit_rlhf import KTO, LoRA, UserError
from lit_rlhf.algorithms.preference import response_logprobs
from lit_rlhf.losses import kto_loss
from tests.algorithms.watched import Watch, watch
from tests.stages import make_stage, make_trainer


class Steps(Watch):
    """Keeps the batches of each step too, and z₀ of each micro-batch."""

    def __init__(self):
        super().__init__()
        self.batches, self.kls = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self.batches.append(batch)
        self.kls.append(pl_module.kl.item())


def moved_reference(module, size=1.5):
    """Log-ratios, and with them z₀, that are not 0 from the start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.frozen["reference"].parameters():
            parameter.add_(size * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return module


def run(inputs, folder, accumulate=1, max_tokens=100, **options):
    module, data = make_stage("kto", inputs, **options)
    data.batches = replace(data.batches, max_tokens=max_tokens)
    steps = Steps()
    trainer = make_trainer(folder, max_epochs=1, accumulate_grad_batches=accumulate, callbacks=[steps])
    trainer.fit(moved_reference(module), data)
    return module, steps, trainer


def test_the_reference_point_is_the_mean_log_ratio_of_the_steps_mismatched_completions(inputs, tmp_path):
    _, steps, _ = run(inputs, tmp_path, accumulate=3)
    start, _ = make_stage("kto", inputs)
    moved_reference(start)
    mismatched = [part.packed for part in steps.batches[0].mismatched]
    assert len(mismatched) == 3 and sum(part.num_sequences for part in mismatched) == sum(
        batch.packed.num_sequences for batch in steps.batches[:3]
    )
    with torch.no_grad():
        logratios = [
            response_logprobs(start.policy, part) - response_logprobs(start.frozen["reference"], part)
            for part in mismatched
        ]
        own = response_logprobs(start.policy, steps.batches[0].packed)
        own = own - response_logprobs(start.frozen["reference"], steps.batches[0].packed)
    expected = torch.cat(logratios).mean().item()
    assert expected > 0.1
    assert steps.kls[:3] == pytest.approx([expected] * 3, rel=1e-4)
    losses = kto_loss(own, torch.zeros_like(own), steps.batches[0].desirable, 0.1, expected)
    assert losses.std() > 0 and own.mean().item() != pytest.approx(expected, rel=0.01)


def test_the_gradient_of_a_step_does_not_depend_on_its_split_into_micro_batches(inputs, tmp_path):
    gradients, kls = [], []
    for budget in (100, 10_000):
        _, steps, _ = run(inputs, tmp_path, accumulate=100, max_tokens=budget)
        gradients.append(torch.cat([gradient.flatten() for gradient in steps.gradients.values()]))
        kls.append(steps.kls[0])
    assert kls[0] == pytest.approx(kls[1], rel=1e-5) and kls[0] > 0
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_at_the_start_policy_and_reference_agree_so_that_each_loss_is_half_of_its_weight(inputs, tmp_path):
    assert watch("kto", inputs, tmp_path).losses[0] == pytest.approx(0.5, abs=1e-6)
    weighted = watch("kto", inputs, tmp_path, desirable_weight=1.2).losses[0]
    assert 0.5 < weighted < 0.6


def test_cached_and_live_reference_give_the_same_losses(inputs, tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_RLHF_CACHE", str(tmp_path / "cache"))
    live, cached = (watch("kto", inputs, tmp_path, cache_reference=cache).losses for cache in (False, True))
    assert cached == pytest.approx(live, abs=1e-5)
    assert len(set(live)) > 2


def test_an_adapter_is_its_own_reference_when_it_is_off(inputs, tmp_path):
    module, data = make_stage("kto", inputs, lora=LoRA(r=4))
    assert not module.frozen
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=1.0)
    start = trainer.validate(module, data, verbose=False)[0]
    assert start["val/loss"] == pytest.approx(0.5, abs=1e-6) and start["val/reward_margin"] == 0
    trainer.fit(module, data)
    assert trainer.callback_metrics["val/reward_margin"] > 0.01


def test_a_step_without_a_class_logs_nothing_of_it(inputs, tmp_path):
    pairs = [json.loads(line) for line in (inputs / "preference.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    module, data = make_stage("kto", inputs)
    data.sources |= type(data)(str(tmp_path / "rows.jsonl"), str(tmp_path / "rows.jsonl")).sources
    data.batches = replace(data.batches, batch_size=1)
    seen = []

    class Classes(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            logged = {name for name in trainer.logged_metrics if name.endswith("_reward")}
            seen.append((batch.desirable.tolist(), logged))

    make_trainer(tmp_path, max_steps=1, callbacks=[Classes()]).fit(module, data)
    [(labels, logged)] = seen
    assert logged == {f"kto/{'' if labels == [True] else 'un'}desirable_reward"}


@pytest.mark.parametrize("option", ["desirable_weight", "undesirable_weight", "beta"])
def test_weights_that_would_leave_a_class_out_are_refused_by_name(option, inputs):
    with pytest.raises(UserError, match=rf"{option} \(0.0\) must be more than 0"):
        KTO(str(inputs / "model"), **{option: 0.0})


def test_there_is_no_kto_without_a_reference(inputs):
    with pytest.raises(TypeError, match="reference_free"):
        KTO(str(inputs / "model"), reference_free=True)
