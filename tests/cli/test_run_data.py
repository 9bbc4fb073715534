"""What a run's config says of its held-out rows."""

import os

import pytest

from lit_rlhf import UserError
from lit_rlhf.cli.run_data import held_out_of
from tests.cli.command_line import QUICK, run

OF_PROMPTS = "{class_path: lit_rlhf.RolloutDataModule, init_args: {validation: p.jsonl, control_tokens: escape}}"
OF_PAIRS = "{class_path: lit_rlhf.PreferenceDataModule, init_args: {validation: d.jsonl, columns: {prompt: q}}}"


def write(folder, data):
    (folder / "logs").mkdir(parents=True)
    (folder / "logs" / "config.yaml").write_text(data)
    return folder


def test_prompts_come_before_the_rows_of_an_earlier_run(tmp_path):
    runs = {"dpo": write(tmp_path / "dpo", f"data: {OF_PAIRS}"), "ppo": write(tmp_path / "ppo", f"data: {OF_PROMPTS}")}
    of_prompts = held_out_of(runs)
    assert (of_prompts.run, of_prompts.kind, of_prompts.control_tokens) == ("ppo", "prompts", "escape")
    of_pairs = held_out_of({"dpo": runs["dpo"]})
    assert (of_pairs.kind, of_pairs.sources[0].name, of_pairs.sources[0].columns) == (
        "preference",
        "d.jsonl",
        {"prompt": "q"},
    )


@pytest.mark.parametrize(
    "data",
    [
        "[",
        "[]",
        "data: 3",
        "data: {class_path: mine.Data, init_args: {validation: x}}",
        "data: {class_path: lit_rlhf.SFTDataModule, init_args: {validation: null}}",
    ],
)
def test_a_config_that_says_nothing_of_held_out_rows_is_passed_over(data, tmp_path):
    with pytest.raises(UserError, match="in the folders of sft, other says on which rows"):
        held_out_of({"sft": write(tmp_path / "sft", data), "other": tmp_path / "nowhere"})


@pytest.mark.filterwarnings("ignore")
def test_rows_that_a_run_was_measured_on_later_are_not_those_of_its_fit(inputs, tmp_path):
    common = ["--config=configs/sft.yaml", *QUICK, "--samples.num_prompts=0", f"--trainer.default_root_dir={tmp_path}"]
    common += [
        f"--model.policy={inputs / 'model'}",
        "--model.from_scratch=false",
        f"--data.train={inputs / 'sft.jsonl'}",
    ]
    fitted, later = inputs / "sft.jsonl", tmp_path / "later.jsonl"
    later.write_bytes(fitted.read_bytes())
    limits = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1"]
    assert run("fit", *common, *limits, f"--data.validation={fitted}") == 0
    for command in ("validate", "test"):
        assert run(command, *common, "--trainer.limit_val_batches=1", f"--data.validation={later}") == 0
    configs = sorted(tmp_path.glob("lightning_logs/version_*/config.yaml"))
    assert len(configs) == 3
    for number, config in enumerate(configs):
        os.utime(config, (number, number))
    assert [source.name for source in held_out_of({"sft": tmp_path}).sources] == [str(fitted)]


def test_of_several_fits_the_newest_says_it_and_a_damaged_config_is_passed_over(tmp_path):
    for number, source in enumerate(("old", "new", "measured")):
        folder = write(tmp_path / "sft" / str(number), f"data: {OF_PROMPTS}".replace("p.jsonl", source))
        with (folder / "logs" / "config.yaml").open("a") as config:
            config.write("\nverbose: true\n" if source == "measured" else "\n")
        os.utime(folder / "logs" / "config.yaml", (number, number))
    write(tmp_path / "sft" / "3", "[")
    assert held_out_of({"sft": tmp_path / "sft"}).sources[0].name == "new"
