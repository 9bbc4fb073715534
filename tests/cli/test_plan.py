from pathlib import Path

import pytest

from tests.cli.command_line import run

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_each_config_has_a_plan(config, workdir, monkeypatch, capsys):
    config = config.absolute()
    monkeypatch.chdir(workdir)
    small = ["--data.rollout_size=16", "--data.num_slots=8", "--data.max_new_tokens=8"] if "ppo" in config.stem else []
    assert run("plan", "--config", config, *small) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "it fits into" in said and "training step" in said
    assert max(map(len, said.splitlines())) <= 120


@pytest.mark.filterwarnings("ignore")
def test_the_config_that_a_run_writes_has_a_plan_wherever_its_checkpoint_is(workdir, tmp_path, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    assert run("fit", "--config", config, "--print_config") == 0
    written = capsys.readouterr().out
    assert "\nckpt_path: null\n" in written and "weights_only: null" in written
    (tmp_path / "config.yaml").write_text(written.replace("ckpt_path: null", "ckpt_path: gone.ckpt"))
    assert run("plan", "--config", tmp_path / "config.yaml") == 0, capsys.readouterr().err
    assert "it fits into" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_told_with_what_would_take_less(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    given = ["--memory=0.02", "--model.policy=runs/sft/model", "--model.from_scratch=false"]
    assert run("plan", "--config", config, *given) == 0
    said = capsys.readouterr().out
    assert "it does not fit into 20.0 MB" in said
    for option in ("data.max_tokens=512", "model.lora={r: 16}", "model.activation_checkpointing=true"):
        assert f"--{option}: " in said


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--gpus=0", "--memory=80"], "--gpus (0) must be 1 to 65536"),
        (["--memory=24TB"], "--memory (24TB) must be a number of GB (10^9 bytes), such as 24"),
        (["--memory=-1"], "--memory (-1.0) must be GB, above 0"),
        (["--tflops=0"], "--tflops (0.0) must be"),
        (["--gpus=two"], "gpus"),
        (["--gpus=2"], "add --memory, in GB"),
        (["--gpus=2", "--memory=80", "--trainer.strategy=deepspeed"], "is not planned for"),
        (["--gpus=2", "--memory=80", "--trainer.strategy=fsdp"], "is FSDP1, which is not supported: use lightning."),
        (["--model.policy=some/where"], "config.json and a tokenizer, which are enough for a plan, or a name on the"),
    ],
)
def test_what_means_nothing_is_refused_in_a_line(given, told, workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run("plan", "--config", config, *given) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_weights_is_enough(workdir, tmp_path, monkeypatch, capsys):
    for file in (workdir / "runs/sft/model").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = Path("configs/dpo.yaml").absolute()
    monkeypatch.chdir(workdir)
    assert run("plan", "--config", config, f"--model.policy={tmp_path}", "--gpus=2", "--memory=24", "--tflops=100") == 0
    said = capsys.readouterr().out
    assert "GPU of 2, with 24.00 GB" in said
    assert "100 TFLOP/s (as stated)" in said
