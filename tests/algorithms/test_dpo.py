"""The DPO module with every loss and option that a YAML can choose."""

import json
import math
from dataclasses import replace
from inspect import signature

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback

from lit_rlhf import DPO, PreferenceDataModule, UserError, losses
from lit_rlhf.algorithms.preference import desensitized, sequence_logprobs
from lit_rlhf.algorithms.preference_loss import LossTerm
from lit_rlhf.cli.main import main
from lit_rlhf.losses import bco_pair_loss, dpo_loss, length_normalized_dpo_loss
from tests.algorithms.dpo_runs import Watch, fit
from tests.algorithms.watched import watch
from tests.stages import make_stage, make_trainer

OPTIONS = {  # of losses that need some
    "alpha_dpo_loss": {"alpha": 0.5},
    "conservative_dpo_loss": {"label_smoothing": 0.1},
    "offset_dpo_loss": {"margin": 0.5},
    "robust_dpo_loss": {"label_smoothing": 0.1},
    "soft_label_dpo_loss": {"margin": 0.5},
}
FAMILY = [name for name in losses.__all__ if "ref_chosen_logprobs" in signature(getattr(losses, name)).parameters]


@pytest.mark.parametrize("name", FAMILY)
def test_every_loss_trains(name, inputs, tmp_path):
    loss = [LossTerm(getattr(losses, name), options=OPTIONS.get(name))]
    if name == "chosen_nll_loss":  # a term for mixtures alone
        loss.append(LossTerm(dpo_loss, 1e-3))
    module, watch = fit(inputs, tmp_path, max_steps=1, loss=loss)
    assert math.isfinite(watch.losses[0])
    start = DPO(str(inputs / "model")).policy.parameters()
    assert any(not torch.equal(a, b) for a, b in zip(module.policy.parameters(), start, strict=True))


IN_A_YAML = {
    "a function": {"loss": "lit_rlhf.losses.ipo_loss"},
    "a function with options": {
        "loss": [{"function": "lit_rlhf.losses.robust_dpo_loss", "options": {"label_smoothing": 0.1}}]
    },
    "a mixture": {
        "loss": [
            {"function": "lit_rlhf.losses.dpo_loss", "weight": 0.8},
            {"function": "lit_rlhf.losses.bco_pair_loss", "weight": 0.2},
            {"function": "lit_rlhf.losses.chosen_nll_loss"},
        ]
    },
    "TR-DPO": {"reference_update": {"alpha": 1.0, "every": 2}},
    "no reference": {"reference_free": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_A_YAML)
def test_a_yaml_chooses_the_loss_and_is_kept_beside_the_run(name, inputs, tmp_path):
    chosen = IN_A_YAML[name]
    config = {
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0}
        | {"enable_checkpointing": False, "default_root_dir": str(tmp_path / "run")},
        "model": {"class_path": "lit_rlhf.DPO", "init_args": {"policy": str(inputs / "model")} | chosen},
        "data": {
            "class_path": "lit_rlhf.PreferenceDataModule",
            "init_args": {"train": str(inputs / "preference.jsonl"), "validation": None, "max_tokens": 100},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    metrics = json.loads((tmp_path / "run" / "summary.json").read_text())["metrics"]
    assert math.isfinite(metrics["train/loss"]) and metrics["train/grad_norm"] > 0
    (kept,) = (tmp_path / "run").rglob("config.yaml")
    kept_arguments = yaml.safe_load(kept.read_text())["model"]["init_args"]
    if isinstance(chosen.get("loss"), list):  # what was left out stands there with its default
        functions = [term["function"] for term in kept_arguments["loss"]]
        assert functions == [term["function"] for term in chosen["loss"]]
    else:
        assert {name: kept_arguments[name] for name in chosen} == chosen


def test_the_loss_of_a_mixture_is_the_sum_of_its_terms(inputs, tmp_path):
    mixture = [LossTerm(dpo_loss, 0.7), LossTerm(losses.chosen_nll_loss, 0.3)]
    _, watch = fit(inputs, tmp_path, max_steps=1, loss=mixture)
    start = DPO(str(inputs / "model")).policy
    chosen, _ = sequence_logprobs(start, watch.batches[0].packed)
    lengths = torch.bincount(watch.batches[0].packed.sequence_ids)[: len(chosen)]
    expected = 0.7 * math.log(2) + 0.3 * (-chosen / lengths).mean().item()
    assert watch.losses[0] == pytest.approx(expected, rel=1e-5)


def test_lengths_are_those_of_the_responses(inputs, tmp_path):
    # The policy starts elsewhere than the reference, so that log-ratios and with them lengths count.
    policy = inputs / "other"
    if not policy.exists():
        module, _ = fit(inputs, tmp_path)
        module.policy.model.save_pretrained(policy)
        module.tokenizer.save_pretrained(policy)
    module = DPO(str(policy), reference=str(inputs / "model"), loss=length_normalized_dpo_loss)
    _, data = make_stage("dpo", inputs)
    watch = Watch()
    make_trainer(tmp_path, max_steps=1, callbacks=[watch]).fit(module, data)
    packed = watch.batches[0].packed
    start = DPO(str(policy), reference=str(inputs / "model"))
    logratio = start.policy(packed)[0] - start.frozen["reference"](packed)[0]
    means = [logratio[packed.sequence_ids == i].mean() for i in range(packed.num_sequences)]
    chosen, rejected = torch.stack(means).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()
    assert expected.item() != pytest.approx(math.log(2), abs=1e-4)
    assert watch.losses[0] == pytest.approx(expected.item(), abs=1e-5)


def test_margins_of_the_data_reach_the_loss_that_asks_for_them_and_others_are_warned_of(inputs, tmp_path):
    rows = [json.loads(line) for line in (inputs / "preference.jsonl").read_text().splitlines()]
    for name, margins in {"none": [0.0] * 24, "some": [i / 8 for i in range(24)], "whole": [1.0] * 24}.items():
        lines = [json.dumps({**row, "margin": margin}) for row, margin in zip(rows, margins, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def first_loss(name, loss):
        module = DPO(str(inputs / "model"), loss=loss)
        source, watch = str(tmp_path / f"{name}.jsonl"), Watch()
        data = PreferenceDataModule(source, source, batch_size=24, tokenizer=module.tokenizer)
        make_trainer(tmp_path, max_steps=1, callbacks=[watch]).fit(module, data)
        return watch.losses[0]

    with pytest.warns(
        UserWarning, match=r"margins of the pairs are not used by the loss of DPO; .*offset_dpo_loss uses"
    ) as heard:
        assert first_loss("some", dpo_loss) == pytest.approx(math.log(2))
    assert sum("margins" in str(warning.message) for warning in heard) == 1
    assert first_loss("none", dpo_loss) == pytest.approx(math.log(2))
    # Policy and reference agree at first, so that z = 0 and the loss is log(1 + exp(margin)).
    expected = sum(math.log1p(math.exp(i / 8)) for i in range(24)) / 24
    with pytest.warns(UserWarning, match="reads the margin of each pair, and 1 of 24 pairs have none, or 0"):
        assert first_loss("some", losses.offset_dpo_loss) == pytest.approx(expected, rel=1e-5)
    with pytest.warns(UserWarning, match="reads the margin of each pair, and 24 of 24 pairs have none"):
        assert first_loss("none", losses.offset_dpo_loss) == pytest.approx(math.log(2))
    assert first_loss("whole", losses.offset_dpo_loss) == pytest.approx(math.log1p(math.e), rel=1e-5)  # without a word
    constant = [LossTerm(losses.offset_dpo_loss, options={"margin": 1.0})]
    with pytest.warns(UserWarning, match="are not used by the loss of DPO"):
        assert first_loss("some", constant) == pytest.approx(math.log1p(math.e), rel=1e-5)


def test_what_a_tool_said_inside_a_response_is_in_no_log_prob(inputs, tmp_path):
    marked = "{% for m in messages %}{{ ('w3 ' if m.role == 'assistant' else 'w4 ') + m.content + ' ' }}{% endfor %}"
    template = marked + "{% if add_generation_prompt %}{{ 'w3 ' }}{% endif %}"
    ask, tool = {"role": "user", "content": "w5"}, {"role": "tool", "content": "w20 w21"}
    calls, says = {"role": "assistant", "content": "w6"}, {"role": "assistant", "content": "w7"}
    row = {"prompt": [ask], "chosen": [calls, tool, says], "rejected": [says]}
    (tmp_path / "tools.jsonl").write_text(json.dumps(row) + "\n")
    module = DPO(str(inputs / "model"))
    watch = Watch()
    data = PreferenceDataModule(str(tmp_path / "tools.jsonl"), None, chat_template=template, tokenizer=module.tokenizer)
    make_trainer(tmp_path, max_steps=1, callbacks=[watch]).fit(module, data)
    packed = watch.batches[0].packed
    assert packed.input_ids.tolist() == [4, 5, 3, 6, 4, 20, 21, 3, 7, 2, 7, 2]
    assert packed.target_ids.tolist() == [6, 7, 2, 7, 2], "neither the tool's words nor the header behind them"
    assert packed.response_lengths.tolist() == [3, 2]


@pytest.mark.parametrize("loss", [dpo_loss, bco_pair_loss])
def test_the_gradient_of_a_step_does_not_depend_on_its_split_into_micro_batches(loss, inputs, tmp_path):
    class Gradient(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            self.taken = torch.cat([p.grad.flatten() for p in pl_module.policy.parameters()])

    gradients = []
    for budget in (100, 10_000):
        module, data = make_stage("dpo", inputs, loss=loss)
        data.batches = replace(data.batches, max_tokens=budget)
        with torch.no_grad():
            next(module.frozen["reference"].parameters()).add_(0.5)  # rewards, and so BCO's shift, are not 0
        make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=100, callbacks=[watch := Gradient()]).fit(
            module, data
        )
        gradients.append(watch.taken)
        if loss is bco_pair_loss:
            shift = module.loss.shift
            assert shift.pairs_seen == 24 and abs(shift.mean) > 0.01
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_reference_free_dpo_is_dpo_against_a_uniform_reference(inputs, tmp_path):
    module, watch = fit(inputs, tmp_path, max_steps=1, reference_free=True)
    assert not module.frozen
    chosen, rejected = sequence_logprobs(DPO(str(inputs / "model")).policy, watch.batches[0].packed)
    zeros = torch.zeros_like(chosen)
    assert watch.losses[0] == pytest.approx(dpo_loss(chosen, rejected, zeros, zeros, 0.1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("beta", [0.0, math.inf, math.nan])
def test_a_beta_that_weighs_nothing_or_all_is_refused_by_name(beta, inputs):
    with pytest.raises(UserError, match=rf"beta \({beta}\) must be"):
        DPO(str(inputs / "model"), beta=beta)


@pytest.mark.parametrize("cache_reference", [False, True])
def test_dpo_starts_at_log_2(inputs, tmp_path, cache_reference):
    watcher = watch("dpo", inputs, tmp_path, cache_reference=cache_reference)
    assert watcher.losses[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("cache_reference", [False, True])
def test_desensitized_log_probs_are_those_of_policy_and_reference(cache_reference, inputs, tmp_path):
    losses = {}
    for alpha in (1.0, 0.3):
        options = {"ld_alpha": alpha, "cache_reference": cache_reference, "learning_rate": 1e-2}
        module, data = make_stage("dpo", inputs, **options)
        trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=None)
        trainer.fit(module, data)
        (metrics,) = trainer.validate(module, data, verbose=False)
        reference, total = DPO(str(inputs / "model")).policy, []
        with torch.no_grad():
            for batch in data.rows_dataloader("val"):
                logratios = [
                    batch.packed.sum_by_sequence(desensitized(network(batch.packed)[0], batch.packed, alpha))
                    for network in (module.policy.eval(), reference.eval())
                ]
                chosen, rejected = (logratios[0] - logratios[1]).chunk(2)
                total += (-torch.nn.functional.logsigmoid(module.beta * (chosen - rejected))).tolist()
        losses[alpha] = sum(total) / len(total)
        assert metrics["val/loss"] == pytest.approx(losses[alpha], rel=1e-5)
    assert losses[0.3] != pytest.approx(losses[1.0], rel=1e-3)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_a_share_of_further_tokens_outside_0_to_1_is_refused(alpha, inputs):
    with pytest.raises(UserError, match=r"ld_alpha \(.*\) must be between 0 and 1"):
        DPO(str(inputs / "model"), ld_alpha=alpha)
