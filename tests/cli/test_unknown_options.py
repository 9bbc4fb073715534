"""Options that there are not: said with all that they stand below, and where one of their name is."""

import sys

import pytest

from lit_rlhf import DPO, KTO, PPO, RolloutDataModule, UnpairedDataModule
from lit_rlhf.cli.unknown_options import (
    class_of,
    hint,
    of_its_own,
    option_paths,
    options_of,
    set_by,
    settings_in,
    whereabouts,
)
from tests.cli.command_line import run

PPO_RUN = ["fit", "--model=lit_rlhf.PPO", "--data=lit_rlhf.RolloutDataModule"]
REWARD = '{"class_path":"lit_rlhf.TextReward","init_args":{"function":"os.getcwd","weight":2}}'
SAID = {  # what is typed -> all that is said
    "--data.top_p=0.9": "there is no option --data.top_p; there is model.generation.top_p",
    '--data.sampling={"temperature":0.7}': "there is no option --data.sampling.temperature; there is "
    "model.temperature or model.generation.temperature",
    '--model.generation={"max_tokens":5}': "there is no option --model.generation.max_tokens; did you mean "
    "max_new_tokens, or data.max_tokens?",
    "--trainer.epochs=3": "there is no option --trainer.epochs; here it is trainer.max_epochs",
    "--data.batch_size=3": "there is no option --data.batch_size; here it is data.rollout_size",
    f"--data.reward={REWARD}": "there is no option --data.reward.weight",
    "--model.lr=1e-5": "there is no option --model.lr; here it is model.learning_rate",
    "--generation.temperature=1": "there is no option --generation.temperature; there is model.generation.temperature",
    "--predictions.generation.top_k=3": "there is no option --predictions.generation.top_k; there is "
    "model.generation.top_k",
    "--kl.coef=1": "there is no option --kl.coef; there is model.kl",
    "--rollout.size=1": "there is no option --rollout.size; did you mean rollout_size?",
    '--model.lora={"r":4,"lora_alpha":8}': "there is no option --model.lora.lora_alpha; here it is model.lora.alpha",
    '--model.lora={"init":"pissa"}': "--model.lora.init: expected 'default' or 'gaussian', got pissa",
    "--model.lora=true": "--model.lora: expected a mapping of options, such as '{r: 16}', or null, got true",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("typed", SAID)
def test_an_option_is_named_by_its_path_and_a_hint_says_where_it_lives(typed, capsys):
    assert run(*PPO_RUN, typed) == 2
    assert capsys.readouterr().err.split("error: ")[-1].splitlines()[0] == SAID[typed]


@pytest.mark.filterwarnings("ignore")
def test_a_config_by_a_relative_path_is_named_with_its_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "c.yaml").write_text("model:\n  class_path: trl.SFTTrainer\n")
    (tmp_path / "y" / "d.yaml").write_text("model:\n  class_path: lit_rlhf.SFT\n  init_args:\n    betta: 3\n")
    monkeypatch.chdir(tmp_path)
    assert run("fit", "--config", "y/c.yaml") == 2
    said = capsys.readouterr().err.split("error: ")[-1].splitlines()[0]
    assert said.startswith(
        "y/c.yaml, line 1, model: expected the import path of a subclass of AlignmentModule, got trl.S"
    )
    assert said.endswith("there is no module trl in the current folder or among what is installed")
    assert run("fit", "--config=y/d.yaml") == 2
    assert "error: y/d.yaml, line 4: there is no option model.betta" in capsys.readouterr().err


def test_options_of_settings_are_found_below_the_option_that_takes_them():
    paths = option_paths({"model": PPO, "data": RolloutDataModule, "none": None})
    assert {"model.temperature", "model.generation.top_k", "model.lora.alpha", "data.max_tokens"} <= set(paths)
    assert not any(path.endswith((".self", ".kwargs", ".args")) for path in paths)
    assert whereabouts("model.lora.lora_alpha", paths, ()) == "; did you mean alpha?"
    assert whereabouts("data.temperature_of", paths, ()) == "; did you mean model.temperature?"
    assert whereabouts("data.nothing_like_it", paths, {"nothing_like_it"}) == ""


def test_settings_are_told_from_other_classes():
    assert settings_in("Subtypes: [<class 'lit_rlhf.models.adapters.LoRA'>, <class 'NoneType'>]") == "{r: 16}"
    assert settings_in("Subtypes: [<class 'lit_rlhf.SFT'>]") is None
    assert class_of("lit_rlhf.PPO") is PPO and class_of("nowhere.X") is class_of(None) is None
    assert "nowhere" not in sys.modules


OWN = "; its own options are beta, desirable_weight, undesirable_weight"


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--model.loss", f"; KTO has one loss{OWN}"),
        ("--model.reference_free", f"; KTO sets it by itself{OWN}"),
        ("--model.nothing_like_it", OWN),
        ("--data.nothing_like_it", ""),
        ("--model.critic", "; PPO has it"),
        ("--data.group_size", "; RolloutDataModule has it"),
        ("--model.beta", " yet: write it after --model, which names the class that has it"),
        ("--model.lora.r", " yet: write it after --model, which names the class that has it"),
    ],
)
def test_what_a_class_has_not_is_answered_with_what_it_has(option, said):
    assert hint(option, {"model": KTO, "data": UnpairedDataModule}, ()) == said


def test_an_argument_that_a_class_gives_its_base_by_itself_is_no_option():
    assert "reference_free" not in options_of(KTO) and {"reference_free", "beta"} <= set(options_of(DPO))
    assert set_by(DPO, "loss") == set_by(None, "loss") == of_its_own(None) == ""
    assert hint("--model.betta", {"model": KTO}, ()) == "; did you mean beta?"
