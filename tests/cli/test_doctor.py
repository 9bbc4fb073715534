"""The doctor reads what runs have written, and tells what is wrong with them."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from lit_rlhf import UserError
from lit_rlhf.cli.doctor import doctor
from lit_rlhf.cli.main import main

CURVES = {"rollout/kl": [1.0, 50.0, 60.0, 70.0], "rollout/score": [0.1, 0.2, 0.3, float("nan")]}


def write_events(folder):
    with SummaryWriter(str(folder)) as writer:
        for tag, values in CURVES.items():
            for at, value in enumerate(values):
                writer.add_scalar(tag, value, 4 * at)


def write_table(folder):
    folder.mkdir(parents=True)
    rows = zip(*CURVES.values(), strict=True)
    lines = [f"{at // 2},{kl},{score},{4 * at}" for at, (kl, score) in enumerate(rows)]
    (folder / "metrics.csv").write_text("\n".join(["epoch,rollout/kl,rollout/score,step", *lines, "2,,,16"]) + "\n")


@pytest.mark.parametrize("write", [write_events, write_table])
def test_it_tells_what_is_wrong_since_when_and_what_helps(write, tmp_path, capsys):
    write(tmp_path / "lightning_logs" / "version_0")
    main(["doctor", str(tmp_path)])
    said = capsys.readouterr().out
    assert "2 curves up to step 12, 15 rules, 1 alarms" in said
    assert "KL beyond budget\n  saw: rollout/kl is 70, above 40\n  since: step 4\n  try: Raise model.kl.kl_coef" in said


def table(folder, steps, tag="rollout/kl", value=1.0):
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text("\n".join([f"{tag},step", *(f"{value},{step}" for step in steps)]) + "\n")


def said_of(folder, capsys):
    main(["doctor", str(folder)])
    return capsys.readouterr().out


def test_it_reads_the_newest_log_of_a_run(tmp_path, capsys):
    write_events(tmp_path / "version_2")
    table(tmp_path / "version_10", range(4))
    assert f"{tmp_path / 'version_10'}: 1 curves up to step 3, 15 rules, 0 alarms" in said_of(tmp_path, capsys)


def test_logs_without_training_hide_no_alarm(tmp_path, capsys):
    write_events(tmp_path / "version_0")
    table(tmp_path / "version_1", [12], "val/kl")  # of validate
    table(tmp_path / "version_2", [])  # of a fit that was refused
    said = said_of(tmp_path, capsys)
    assert "version_0: 2 curves" in said and "KL beyond budget" in said
    assert all(f"version_{log}: passed over, it holds no curve of training" in said for log in (1, 2))


def test_the_parts_of_a_resumed_run_are_one_curve(tmp_path, capsys):
    write_table(tmp_path / "version_0")  # a KL of 50 at step 4, and more later
    table(tmp_path / "version_1", [1])  # another run, in between
    table(tmp_path / "version_2", [12, 16], value=70.0)  # from the checkpoint of step 8 or later
    said = said_of(tmp_path, capsys)
    assert f"{tmp_path / 'version_0'} and version_2: 2 curves up to step 16" in said
    assert "since: step 4" in said


@pytest.mark.parametrize(("config", "joins"), [("ckpt_path: last\n", True), ("ckpt_path: null\n", False)])
def test_a_run_that_asked_for_no_checkpoint_goes_on_from_none(config, joins, tmp_path, capsys):
    write_table(tmp_path / "version_0")
    table(tmp_path / "version_1", [9, 19])  # with another log_every_n_steps it may begin as late
    (tmp_path / "version_1" / "config.yaml").write_text(config)
    assert ("version_0 and version_1" in said_of(tmp_path, capsys)) == joins


def test_each_run_of_a_folder_is_judged_and_one_without_curves_passed_over(tmp_path, capsys):
    write_table(tmp_path / "ppo" / "lightning_logs" / "version_0")
    table(tmp_path / "dpo" / "lightning_logs" / "version_0", range(4))
    table(tmp_path / "sft" / "lightning_logs" / "version_0", [])
    said = said_of(tmp_path, capsys)
    assert "sft/lightning_logs: passed over" in said
    assert "dpo/lightning_logs/version_0: 1 curves" in said and "ppo/lightning_logs/version_0: 2 curves" in said


def test_curves_of_validation_alone_are_no_healthy_run(tmp_path):
    table(tmp_path / "version_0", [3], "val/loss")
    with pytest.raises(UserError, match="hold no curve of training, only of validation"):
        doctor(str(tmp_path))


def test_a_run_that_is_not_there_or_has_written_nothing_is_told(tmp_path):
    with pytest.raises(UserError, match=r"run: there is no folder .*gone; name that of a run"):
        doctor(str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"has no curves"):
        doctor(str(tmp_path))
    (tmp_path / "metrics.csv").write_text("a,b\n1,two\n")
    with pytest.raises(UserError, match=r"metrics.csv, line 2: expected a step and numbers"):
        doctor(str(tmp_path))


@pytest.mark.parametrize("name", ["metrics.csv", "events.out.tfevents.1.host"])
def test_a_file_without_a_curve_is_no_healthy_run(name, tmp_path):
    (tmp_path / name).write_text("")
    with pytest.raises(UserError, match="holds no curve: its run logged nothing, or the file is damaged"):
        doctor(str(tmp_path))
