"""What a run's config says of its held-out rows."""

import pytest

from lit_rlhf import UserError
from lit_rlhf.cli.run_data import held_out_of

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
