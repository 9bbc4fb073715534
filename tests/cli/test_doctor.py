"""The doctor reads what runs have written, and tells what is wrong with them."""

import os

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


def test_it_reads_the_newest_log_of_a_run(tmp_path, capsys):
    write_events(tmp_path / "version_0")
    write_table(tmp_path / "version_1")
    os.utime(tmp_path / "version_1" / "metrics.csv", (0, 0))
    main(["doctor", f"--run={tmp_path}"])
    assert "version_0: 2 curves" in capsys.readouterr().out


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
