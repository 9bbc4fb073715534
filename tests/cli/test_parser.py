"""Programs of one function, as the benchmarks are: what the user got wrong is one line, before anything is computed."""

import sys
from pathlib import Path

import pytest

from benchmarks import credit_assignment, curves, frontier, optimality
from lit_rlhf.cli.main import main
from lit_rlhf.cli.parser import command, with_bare_flags

ARGUMENTS = {  # program and arguments -> words of the answer
    (optimality.main, "--problems", "trap"): "problems: expected a list, '[trap]', got trap\nFor all options: ",
    (optimality.main, "--problems", "[]"): "problems (()) must be one name at least",
    (optimality.main, "--algorithms", "[pop]"): "algorithms: unknown pop; there are ppo, ",
    (optimality.main, "--betas", "[]"): "betas (()) must be one at least, each more than 0",
    (optimality.main, "--processes", "0"): "processes (0) must be 1 or more",
    (optimality.main, "--output", "a_file/x.jsonl"): "a_file cannot be made",
    (credit_assignment.main, "--lengths", "64"): "lengths: expected a list, '[64]', got 64",
    (credit_assignment.main, "--lengths", "[0]"): "lengths ((0,)) must be one at least, each 1 or more",
    (credit_assignment.main, "--seeds", "0"): "seeds (0) must be 1 or more",
    (credit_assignment.main, "--output", "a_file/x.jsonl"): "a_file cannot be made",
    (frontier.main, "--root", "nowhere"): "nowhere/sft/model is missing",
    (frontier.main, "--root", "demo", "--output", "a_file/x.jsonl"): "a_file cannot be made",
    (curves.curves, "--run", "nowhere", "--output", "x.jsonl"): "run: no TensorBoard files under ",
}


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=lambda arguments: " ".join(arguments[1:]))
def test_a_mistake_in_the_arguments_of_a_benchmark_is_one_line_before_anything_runs(
    arguments, tmp_path, monkeypatch, capsys
):
    function, *typed = arguments
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["program", *typed])
    Path("a_file").touch()
    for stage in ("sft", "reward_model"):
        Path("demo", stage, "model").mkdir(parents=True)
    with pytest.raises(SystemExit) as exit:
        command(function)
    said, err = capsys.readouterr()
    assert exit.value.code == 2
    assert said == ""
    assert err.startswith("error: ") and ARGUMENTS[arguments] in err
    assert "lit-rlhf fit" not in err


def test_the_lines_of_a_benchmark_go_into_a_folder_that_is_made(tmp_path, monkeypatch, capsys):
    target = tmp_path / "new" / "lines.jsonl"
    options = ["--lengths=[4]", "--seeds=1", "--max_samples=16"]
    monkeypatch.setattr(sys, "argv", ["program", f"--output={target}", *options])
    command(credit_assignment.main)
    assert target.read_text() == capsys.readouterr().out
    assert len(target.read_text().splitlines()) == len(credit_assignment.METHODS)


def test_the_curves_of_a_run_without_rollouts_are_refused_by_name(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path / "run")
    writer.add_scalar("rollout/score", 1.0, 0)
    writer.close()
    monkeypatch.setattr(sys, "argv", ["program", f"--run={tmp_path}", f"--output={tmp_path / 'new' / 'x.jsonl'}"])
    with pytest.raises(SystemExit):
        command(curves.curves)
    assert "holds no rollout/gold, rollout/kl; name the folder of a PPO run" in capsys.readouterr().err


OLD_PATHS = {  # arguments -> what is said
    (
        "--model=lit_rlhf.module.AlignmentModule",
    ): "lit_rlhf.module.AlignmentModule is not there; write lit_rlhf.algorithms.module.AlignmentModule",
    (
        "--model=lit_rlhf.DPO",
        "--model.loss=lit_rlhf.dpo_loss",
    ): "lit_rlhf.dpo_loss is not there; write lit_rlhf.losses.dpo_loss",
    ("--model=lit_rlhf.ppo.PPO",): "lit_rlhf.ppo.PPO is not there; write lit_rlhf.PPO",
    (
        "--model=lit_rlhf.PPO",
        "--model.kl=lit_rlhf.kl.FixedKL",
    ): "lit_rlhf.kl.FixedKL is not there; write lit_rlhf.FixedKL",
    (
        "--model=lit_rlhf.DPO",
        "--model.loss=lit_rlhf.losses.pairs.ipo_loss",
    ): "lit_rlhf.losses.pairs.ipo_loss is not there; write lit_rlhf.losses.ipo_loss",
    (
        "--model=lit_rlhf.SFT",
        "--trainer.callbacks=lit_rlhf.compilation.CompileModel",
    ): "lit_rlhf.compilation.CompileModel is not there; write lit_rlhf.callbacks.CompileModel",
    (
        "--model=lit_rlhf.PPO",
        "--model.kl_penalty={class_path: lit_rlhf.kl.KLPenalty}",
    ): "lit_rlhf.kl.KLPenalty is not there; write lit_rlhf.KLPenalty",
}


@pytest.mark.parametrize("arguments", OLD_PATHS, ids=lambda arguments: arguments[-1].split("=")[-1])
def test_an_import_path_of_ours_that_has_moved_is_answered_with_the_new_one(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", "fit", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines()[0] == f"error: {OLD_PATHS[arguments]}"


@pytest.mark.parametrize(
    ("model", "option", "old", "new"),
    [
        ("PPO", "advantages: {{function: {}}}", "lit_rlhf.advantages.gae", "lit_rlhf.losses.gae"),
        ("PPO", "generation: {{class_path: {}}}", "lit_rlhf.rollout.GenerationSettings", "lit_rlhf.GenerationSettings"),
        ("DPO", "loss: [{{function: {}}}]", "lit_rlhf.losses.pairs.ipo_loss", "lit_rlhf.losses.ipo_loss"),
    ],
)
def test_an_import_path_that_has_moved_is_answered_with_its_place_in_the_config(
    model, option, old, new, tmp_path, capsys, monkeypatch
):
    config = tmp_path / "old.yaml"
    config.write_text(f"model:\n  class_path: lit_rlhf.{model}\n  init_args:\n    {option.format(old)}\n")
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", "fit", f"--config={config}"])
    with pytest.raises(SystemExit):
        main()
    name, inner = option.split(":")[0], "function" if "function" in option else "class_path"
    place = f"{config}, line 4, model.{name}.{inner}"
    assert capsys.readouterr().err.splitlines()[0] == f"error: {place}: {old} is not there; write {new}"


def test_a_path_of_ours_beside_a_wrong_one_of_the_users_is_not_blamed(capsys, monkeypatch):
    reward = ["--model=lit_rlhf.PPO", "--data=lit_rlhf.RolloutDataModule", "--data.reward=json.Nothing"]
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", "fit", *reward])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert "Nothing" in said and "lit_rlhf.Reward" not in said


def test_an_option_of_a_base_class_is_answered_with_a_class_to_name(capsys, monkeypatch):
    base = "lit_rlhf.algorithms.preference.PreferenceModule"
    monkeypatch.setattr(sys, "argv", ["lit-rlhf", "fit", f"--model={base}", "--model.policy=demo"])
    with pytest.raises(SystemExit):
        main()
    said = f"error: --model.policy: {base} is a base that others stand on, not a method; name one, such as lit_rlhf.DPO"
    assert capsys.readouterr().err.splitlines()[0] == said


def test_a_bare_flag_of_a_program_says_true():
    def program(name: str, merge: bool | None = None, force: bool = False) -> None: ...

    assert with_bare_flags(program, ["--merge", "--name", "x", "--force"]) == [
        "--merge=true",
        "--name",
        "x",
        "--force=true",
    ]
    for argv in (["--merge", "false"], ["--merge=false", "--name=y"], []):
        assert with_bare_flags(program, argv) == argv
