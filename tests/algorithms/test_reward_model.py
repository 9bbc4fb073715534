import json
import math
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification

from lit_rlhf import RewardModel, RewardModelReward, UserError
from lit_rlhf.callbacks import HuggingFaceExport
from lit_rlhf.losses import bradley_terry_loss, dpo_loss, rao_kupper_loss, score_difference_loss
from lit_rlhf.models.policy import Scorer
from tests.cli.command_line import QUICK, run
from tests.stages import make_stage, make_trainer
from tests.tiny import tiny_tokenizer


def fit(inputs, folder, **options):
    torch.manual_seed(0)  # the head is drawn at random
    module, data = make_stage("reward_model", inputs, **options)
    trainer = make_trainer(folder, max_epochs=1, limit_val_batches=None, callbacks=[HuggingFaceExport()])
    trainer.fit(module, data)
    return module, data, trainer


def held_out_scores(scorer, data, split="val"):
    with torch.no_grad():
        packed = [batch.packed for batch in data.rows_dataloader(split)]
        return torch.cat([scorer(batch, batch.last_nodes) for batch in packed])


@pytest.mark.parametrize("normalize", [None, "mean", "mean_and_std"])
def test_the_export_is_normalised_as_asked_and_keeps_the_order_of_scores(inputs, tmp_path, normalize):
    plain, data, _ = fit(inputs, tmp_path / "plain", normalize=None)
    fit(inputs, tmp_path, normalize=normalize)
    raw = held_out_scores(plain.reward_model, data)
    exported = RewardModel(str(tmp_path / "model"), fresh_head=False).reward_model
    mean, std = {
        None: (raw.mean().item(), raw.std(correction=0).item()),
        "mean": (0.0, raw.std(correction=0).item()),
        "mean_and_std": (0.0, 1.0),
    }[normalize]
    scores = held_out_scores(exported, data)
    assert abs(raw.mean().item()) > 0.01 and abs(raw.std(correction=0).item() - 1) > 0.01
    assert scores.mean().item() == pytest.approx(mean, abs=1e-4)
    assert scores.std(correction=0).item() == pytest.approx(std, rel=1e-3)
    assert torch.equal(scores.argsort(), raw.argsort())


def test_rewards_read_the_shift_and_transformers_scores_differ_by_it_alone(inputs, tmp_path):
    fit(inputs, tmp_path, normalize="mean_and_std")
    reward = RewardModelReward(str(tmp_path / "model"))
    reward.bind(tiny_tokenizer(), torch.device("cpu"))
    score = reward([np.array([5, 6])], [np.array([7, 8, 2])]).item()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        logit = model(torch.tensor([[5, 6, 7, 8, 2]])).logits.item()
    shift = json.loads((tmp_path / "model" / "config.json").read_text())["score_bias"]
    assert shift != 0
    assert score == pytest.approx(logit + shift, abs=1e-5)


def test_without_held_out_pairs_the_training_pairs_serve(inputs, tmp_path):
    torch.manual_seed(0)
    module, data = make_stage("reward_model", inputs)
    data.sources["validation"] = None
    saver = ModelCheckpoint(dirpath=tmp_path, filename="end", every_n_train_steps=1)
    options = {"max_epochs": 1, "callbacks": [HuggingFaceExport(), saver], "enable_checkpointing": True}
    make_trainer(tmp_path, **options).fit(module, data)
    before = json.loads((tmp_path / "model" / "config.json").read_text())["score_bias"]
    exported = RewardModel(str(tmp_path / "model"), fresh_head=False).reward_model
    assert held_out_scores(exported, data, "train").mean().item() == pytest.approx(0, abs=1e-4)

    shutil.rmtree(tmp_path / "model")  # a finished run that is resumed has all of them before it again
    make_trainer(tmp_path, **options).fit(module, data, ckpt_path=tmp_path / "end.ckpt")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["score_bias"] == pytest.approx(before)


def test_one_epoch_anneals_the_learning_rate_to_0(inputs, tmp_path):
    config = yaml.safe_load((Path(__file__).parents[2] / "configs" / "reward_model.yaml").read_text())
    assert config["trainer"]["max_epochs"] == 1
    _, data = make_stage("reward_model", inputs)
    module = RewardModel(str(inputs / "model"), learning_rate=1e-3)
    trainer = make_trainer(tmp_path, max_epochs=config["trainer"]["max_epochs"])
    trainer.fit(module, data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


def test_an_export_leaves_the_module_as_it_has_learnt(inputs, tmp_path):
    module, data, _ = fit(inputs, tmp_path, normalize="mean_and_std")
    plain, _, _ = fit(inputs, tmp_path / "plain", normalize=None)
    torch.testing.assert_close(held_out_scores(module.reward_model, data), held_out_scores(plain.reward_model, data))


def test_scores_that_validation_saw_are_not_computed_again(inputs, tmp_path, monkeypatch):
    forwards, real = [], Scorer.forward
    monkeypatch.setattr(Scorer, "forward", lambda *args: forwards.append(1) or real(*args))
    module, _, _ = fit(inputs, tmp_path)
    done = len(forwards)
    module.before_export()
    assert len(forwards) == done


def test_weights_that_moved_after_the_last_validation_are_normalised_by_their_own_scores(inputs, tmp_path):
    torch.manual_seed(0)
    module, data = make_stage("reward_model", inputs)
    options = {"max_epochs": 3, "check_val_every_n_epoch": 2, "limit_val_batches": None}
    make_trainer(tmp_path, callbacks=[HuggingFaceExport()], **options).fit(module, data)
    exported = RewardModel(str(tmp_path / "model"), fresh_head=False).reward_model
    assert held_out_scores(exported, data).mean().item() == pytest.approx(0, abs=1e-4)


def test_a_fresh_head_forgets_the_shift_of_the_old_one(inputs, tmp_path):
    fit(inputs, tmp_path)
    assert RewardModel(str(tmp_path / "model"), fresh_head=False).reward_model.bias != 0
    assert RewardModel(str(tmp_path / "model"), fresh_head=True).reward_model.bias == 0


def test_scores_that_are_all_equal_cannot_be_scaled(inputs, tmp_path):
    module, data = make_stage("reward_model", inputs, normalize="mean_and_std", learning_rate=0.0)
    torch.nn.init.zeros_(module.reward_model.model.score.weight)
    with pytest.raises(UserError, match="mean_and_std"):
        make_trainer(tmp_path, max_epochs=1, callbacks=[HuggingFaceExport()]).fit(module, data)


def test_loaders_without_a_data_module_will_do(inputs, tmp_path):
    torch.manual_seed(0)
    module, data = make_stage("reward_model", inputs)
    data.setup("fit")
    trainer = make_trainer(tmp_path, max_epochs=1, limit_val_batches=None, callbacks=[HuggingFaceExport()])
    trainer.fit(module, data.rows_dataloader("train"), data.rows_dataloader("val"))
    exported = RewardModel(str(tmp_path / "model"), fresh_head=False).reward_model
    assert held_out_scores(exported, data).mean().item() == pytest.approx(0, abs=1e-4)


def test_another_word_for_normalize_is_refused(inputs):
    with pytest.raises(UserError, match="normalize"):
        RewardModel(str(inputs / "model"), normalize="std")


def test_validation_reports_accuracy_confidence_and_calibration(inputs, tmp_path):
    module, data, trainer = fit(inputs, tmp_path)
    (metrics,) = trainer.validate(module, data, verbose=False)
    with torch.no_grad():
        packed = [batch.packed for batch in data.rows_dataloader("val")]
        pairs = [module.reward_model(batch, batch.last_nodes).chunk(2) for batch in packed]
    chosen, rejected = (torch.cat(part) for part in zip(*pairs, strict=True))
    confidence = (chosen - rejected).abs().sigmoid()
    assert metrics["val/confidence"] == pytest.approx(confidence.mean().item(), abs=1e-5)
    assert metrics["val/accuracy"] == pytest.approx((chosen > rejected).float().mean().item(), abs=1e-5)
    # An independent slow loop over the bins.
    error = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        inside = (confidence >= low) & (confidence < low + 0.05)
        if inside.any():
            accuracy = (chosen > rejected)[inside].float().mean()
            error += inside.float().mean().item() * abs(accuracy - confidence[inside].mean()).item()
    assert metrics["val/calibration_error"] == pytest.approx(error, abs=1e-5)


def test_centring_holds_the_scores_of_each_pair_around_0(inputs, tmp_path):
    sums = {}
    for coef in (0.0, 1.0):
        torch.manual_seed(0)
        module, data = make_stage("reward_model", inputs, center_coef=coef, normalize=None)
        make_trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(module, data)
        with torch.no_grad():
            packed = [batch.packed for batch in data.rows_dataloader("train")]
            sums[coef] = torch.cat([sum(module.reward_model(batch, batch.last_nodes).chunk(2)) for batch in packed])
    assert sums[1.0].square().mean() < 0.2 * sums[0.0].square().mean()


@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_loss_that_is_logged_is_that_of_pairs_plus_the_centring(inputs, tmp_path, coef):
    module, data, trainer = fit(inputs, tmp_path, center_coef=coef)
    (metrics,) = trainer.validate(module, data, verbose=False)
    total, pairs = 0.0, 0
    with torch.no_grad():
        for batch in data.rows_dataloader("val"):
            for chosen, rejected in zip(
                *module.reward_model(batch.packed, batch.packed.last_nodes).chunk(2), strict=True
            ):
                total += math.log1p(math.exp(rejected - chosen)) + coef * (chosen + rejected).item() ** 2
                pairs += 1
    assert metrics["val/loss"] == pytest.approx(total / pairs, rel=1e-5)


@pytest.mark.parametrize("coef", [-0.1, math.inf, math.nan])
def test_a_centring_that_pushes_or_is_no_number_is_refused_by_name(inputs, coef):
    with pytest.raises(UserError, match=rf"center_coef \({coef}\) must be 0 or more and finite"):
        RewardModel(str(inputs / "model"), center_coef=coef)


def write_margins(folder, margins):
    rows = [
        {"prompt": f"w{3 + row % 20} w39", "chosen": f" w{4 + row % 20} w5", "rejected": " w6", "margin": margin}
        for row, margin in enumerate(margins)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


def test_regression_brings_the_difference_of_scores_to_that_of_the_ratings(inputs, tmp_path):
    pairs = write_margins(tmp_path, [1.0, 2.0, 3.0, 0.5] * 4)
    torch.manual_seed(0)
    module, data = make_stage("reward_model", inputs, loss=score_difference_loss, learning_rate=1e-2)
    data = type(data)(pairs, pairs, tokenizer=module.tokenizer)
    make_trainer(tmp_path, max_epochs=60).fit(module, data)
    batch = next(iter(data.rows_dataloader("train")))
    chosen, rejected = module.reward_model.eval()(batch.packed, batch.packed.last_nodes).chunk(2)
    assert (chosen - rejected - batch.margin).abs().max() < 0.3


@pytest.mark.filterwarnings("ignore")  # of LightningCLI run from within Python
def test_a_loss_and_its_options_are_chosen_in_a_yaml(inputs, tmp_path):
    config = {
        "model": {
            "class_path": "lit_rlhf.RewardModel",
            "init_args": {
                "policy": str(inputs / "model"),
                "loss": {"function": "lit_rlhf.losses.rao_kupper_loss", "options": {"threshold": 0.5}},
            },
        },
        "data": {
            "class_path": "lit_rlhf.PreferenceDataModule",
            "init_args": {"train": write_margins(tmp_path, [1.0, 0.0] * 8), "validation": None},
        },
        "trainer": {"default_root_dir": str(tmp_path), "max_epochs": 1, "logger": False},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert run("fit", "--config", tmp_path / "config.yaml", *QUICK) == 0
    assert (tmp_path / "model" / "config.json").exists()


def test_margins_that_are_all_0_are_no_ties(inputs, tmp_path):
    module, data = make_stage("reward_model", inputs, loss=rao_kupper_loss)
    data = type(data)(write_margins(tmp_path, [0.0] * 4), None, tokenizer=module.tokenizer)
    with pytest.raises(UserError, match="takes a pair of margin 0 for a tie, and so all 4: give those that were won"):
        make_trainer(tmp_path, max_epochs=1).fit(module, data)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (dpo_loss, r"model\.loss: dpo_loss needs ref_rejected_logprobs, beta"),
        (lambda chosen, rejected, margin: (chosen - rejected).sum(), "must give a loss per pair"),
        (lambda chosen, rejected, margin: margin, "gives losses without a gradient"),
        (partial(rao_kupper_loss, threshold=0.0), r"model\.loss: .*threshold \(0\.0\) must be a number above 0"),
        (partial(bradley_terry_loss, slope=2.0), "bradley_terry_loss would ignore slope"),
    ],
)
def test_what_is_no_loss_of_pairs_is_refused_by_name(loss, said, inputs):
    with pytest.raises(UserError, match=said):
        RewardModel(str(inputs / "model"), loss=loss)
