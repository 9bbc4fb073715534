"""What a command line lacks is said in one line, with what to write."""

from pathlib import Path

import pytest

from lit_rlhf.cli.commands import RUNS
from lit_rlhf.cli.missing import class_with, missing, missing_part, models_of
from tests.cli.command_line import run

LACKING = {  # command line -> all that is said
    "doctor": "run is missing; write lit-rlhf doctor runs/ppo",
    "chat": "model is missing; write lit-rlhf chat runs/sft/model",
    "score f.g": "data and output are missing; write lit-rlhf score runs/reward_model/model --data=rows.jsonl --output="
    "scored.jsonl",
    "score": "reward, data and output are missing; write lit-rlhf score runs/reward_model/model --data=rows.jsonl --out"
    "put=scored.jsonl",
    "export": "ckpt_path and folder are missing; write lit-rlhf export --ckpt_path=X.ckpt --folder=model",
    "export --folder=x": "ckpt_path is missing; write lit-rlhf export --ckpt_path=X.ckpt --folder=model",
    "fit --model=lit_rlhf.DPO": "data is missing; DPO learns from a PreferenceDataModule: add --data=lit_rlhf.Preferenc"
    "eDataModule, or name a config",
    "predict --model lit_rlhf.GRPO": "data is missing; GRPO learns from a RolloutDataModule: add --data=lit_rlhf.Rollou"
    "tDataModule, or name a config",
    "plan --data=lit_rlhf.UnpairedDataModule": "model is missing; UnpairedDataModule is for KTO; add one, as in --model"
    "=lit_rlhf.KTO, or a config",
} | {
    command: f"there is neither model nor data; name a config, as in lit-rlhf {command} --config=configs/sft.yaml"
    for command in (*RUNS, "plan")
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("typed", LACKING)
def test_what_a_command_lacks_is_said_with_what_to_write(typed, capsys):
    assert run(*typed.split()) == 2
    assert capsys.readouterr().err.split("error: ")[-1].splitlines()[0] == LACKING[typed]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("trainer", "line", "option"),
    [
        ("callbacks: EarlyStopping", 2, "trainer.callbacks"),
        ("callbacks:\n  - DeviceStatsMonitor\n  - EarlyStopping", 4, "trainer.callbacks"),
        ("callbacks:\n  - class_path: EarlyStopping", 3, "trainer.callbacks.class_path"),
    ],
)
def test_an_argument_that_a_class_in_a_config_lacks_is_said_with_file_line_and_option(
    trainer, line, option, tmp_path, capsys
):
    file = tmp_path / "c.yaml"
    file.write_text(f"trainer:\n  {trainer}\nmodel: lit_rlhf.SFT\ndata: lit_rlhf.SFTDataModule\n")
    assert run("fit", "--config", file) == 2
    assert capsys.readouterr().err.split("error: ")[-1].splitlines()[0] == (
        f"{file}, line {line}, {option}: lightning.pytorch.callbacks.EarlyStopping: monitor is missing: write "
        "{class_path: EarlyStopping, init_args: {monitor: ...}}"
    )


def test_the_class_that_lacks_an_argument_is_found_on_the_command_line_too():
    typed = ["fit", "--trainer.callbacks=[DeviceStatsMonitor,{class_path: EarlyStopping}]"]
    assert class_with("monitor", typed) == ("--trainer.callbacks", "lightning.pytorch.callbacks.EarlyStopping")
    assert class_with("nothing", typed) is None
    said = missing("the following arguments are required: nothing", ["fit"], lambda part: None)
    assert said == "nothing is missing: give it by the option of that name, or in a config"
    assert missing("something else", ["fit"], lambda part: None) is None


def test_a_part_of_ones_own_is_answered_without_a_guess():
    assert missing_part("fit", "mine.Model", None) == (
        "data is missing; add --data=... with the data module of Model, or name a config by --config"
    )
    assert missing_part("fit", None, "mine.Data") == (
        "model is missing; add one, as in --model=lit_rlhf.SFT, or a config"
    )
    assert models_of("stepwise") == ["ProcessRewardModel"] and models_of(None) == []
    assert Path("configs/sft.yaml").exists()  # which the answer names
