import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_rlhf import SFT, UserError
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.cli import main
from lit_rlhf.cli.main import AlignmentCLI, WholeConfig
from lit_rlhf.data import batching
from lit_rlhf.files import NEW
from lit_rlhf.models import holding, loading
from tests.cli.command_line import QUICK, run


@pytest.mark.filterwarnings("ignore")  # of the arguments that the tests were called with, among others
def test_the_command_line_can_be_used_from_python_without_a_command(workdir, monkeypatch):
    config = str(Path("configs/sft.yaml").absolute())
    monkeypatch.chdir(workdir)
    cli = AlignmentCLI(
        AlignmentModule,
        LightningDataModule,
        run=False,
        auto_configure_optimizers=False,
        subclass_mode_model=True,
        subclass_mode_data=True,
        args=["--config", config],
    )
    assert isinstance(cli.model, SFT) and cli.datamodule.tokenizer is cli.model.tokenizer


@pytest.mark.filterwarnings("ignore")
def test_more_processes_than_a_cpu_has_cores_are_refused_before_any_starts(monkeypatch, capsys):
    monkeypatch.setattr(AlignmentCLI, "_run_subcommand", lambda cli, name: None)  # would start them all
    options = ["--config", "configs/sft.yaml", *QUICK]
    assert run("fit", *options, "--trainer.devices=999") == 2
    assert "trainer.devices (999) must be at most " in capsys.readouterr().err
    assert run("fit", *options, "--trainer.devices=2") == 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGXCPU, 152)]
)
def test_a_run_that_a_signal_ends_says_how_it_goes_on(workdir, monkeypatch, capsys, number, status):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    step = SFT.training_step

    def interrupt(self, batch, batch_idx):
        if self.global_step == 2:
            os.kill(os.getpid(), number)
        return step(self, batch, batch_idx)

    root = f"out/stopped{status}"
    options = ["--config", config, *QUICK, f"--trainer.default_root_dir={root}", "--trainer.limit_val_batches=0"]
    monkeypatch.setattr(SFT, "training_step", interrupt)
    assert run("fit", *options) == status
    [line] = [line for line in capsys.readouterr().err.splitlines() if "ckpt" in line]
    assert line == (
        f"{number.name} ended the run after step 3; no model was exported. It goes on from there with "
        f"--ckpt_path={root}/stopped.ckpt"
    )
    assert not Path(root, "model").exists()
    monkeypatch.setattr(SFT, "training_step", step)
    assert run("fit", *options, "--trainer.max_steps=4", f"--ckpt_path={root}/stopped.ckpt") == 0
    assert json.loads(Path(root, "summary.json").read_text())["steps"] == 4


class Loads:
    """A library under way, when SIGTERM comes."""

    def __getattr__(self, name):
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_a_signal_ends_before_it_trains_says_that_there_is_nothing_to_go_on_from(
    workdir, monkeypatch, capsys
):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.setattr("lit_rlhf.models.weights.AutoConfig", Loads())
    assert run("fit", "--config", config, *QUICK, "--trainer.default_root_dir=out/early") == 143
    assert capsys.readouterr().err.splitlines()[-1] == "SIGTERM ended the program before its work began"


def die(batch):
    """In a worker."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_ends_the_run_with_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(batching, "as_it_is", die)
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parents[2] / "configs" / "sft.yaml"
    options = ["--data.num_workers=1", "--trainer.limit_val_batches=0", "--trainer.max_steps=2"]
    assert run("fit", "--config", config, *QUICK, *options) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "of data.num_workers has died" in line and "--ckpt_path=last" in line


@pytest.mark.filterwarnings("ignore")
def test_the_default_logger_draws_no_metric_of_its_own_and_one_that_a_user_names_stays_as_it_is(workdir, monkeypatch):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    drawn = {}
    for root, logger in (
        ("plain", []),
        ("named", ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=x"]),
    ):
        options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=0", f"--trainer.default_root_dir={root}"]
        assert run("fit", "--config", config, *QUICK, *options, "--trainer.log_every_n_steps=1", *logger) == 0
        (folder,) = Path("x" if logger else root).glob("lightning_logs/version_*")
        drawn[root] = set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert drawn["named"] - drawn["plain"] == {"hp_metric"} and "train/loss" in drawn["plain"]


def test_what_a_killed_run_left_of_its_config_goes_with_the_next(tmp_path):
    folders = [tmp_path / "lightning_logs" / f"version_{i}" for i in range(2)]
    folders[0].mkdir(parents=True)
    (folders[0] / f".config.yaml{NEW}").write_text("half")
    writer = WholeConfig(SimpleNamespace(dump=lambda *args, **kwargs: "seed: 0"), None)
    writer.setup(SimpleNamespace(log_dir=str(folders[1]), is_global_zero=True, loggers=[]), None, "fit")
    assert [path.name for path in tmp_path.rglob("*config*")] == ["config.yaml"]


@pytest.mark.filterwarnings("ignore")
def test_a_timer_and_a_bar_of_ones_own_are_taken_from_a_config_also_without_a_terminal(workdir, monkeypatch):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    package = "lightning.pytorch.callbacks"
    timer = f"{{class_path: {package}.Timer, init_args: {{duration: '00:01:00:00'}}}}"
    bar = f"{{class_path: {package}.RichProgressBar}}"
    options = ["--trainer.accelerator=cpu", "--trainer.max_steps=1", "--trainer.limit_val_batches=0"]
    callbacks = f"--trainer.callbacks=[{timer}, {bar}]"
    assert run("fit", "--config", config, *options, callbacks, "--trainer.default_root_dir=out/timed") == 0
    (written,) = Path("out/timed").rglob("config.yaml")
    assert "interval: step" in written.read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_bare_trainer_trains_without_what_it_leaves_out(workdir, monkeypatch):
    monkeypatch.chdir(workdir)
    options = ["--trainer.barebones=true", "--trainer.max_steps=1", "--trainer.default_root_dir=out/bare"]
    model = ["--model=lit_rlhf.SFT", "--model.policy=demo", "--model.from_scratch=true"]
    assert run("fit", *model, "--data=lit_rlhf.SFTDataModule", *options, "--trainer.accelerator=cpu") == 0
    assert Path("out/bare/model/config.json").exists()


def test_the_module_is_the_command_line():
    done = subprocess.run([sys.executable, "-m", "lit_rlhf", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "fit" in done.stdout


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["RolloutBackend", "VLLMBackend"])
def test_a_backend_is_named_like_all_else_also_where_it_is_not_installed(backend, capsys):
    assert run("fit", "--config", "configs/ppo.yaml", f"--data.backend=lit_rlhf.{backend}", "--print_config") == 0
    assert f"class_path: lit_rlhf.{backend}" in capsys.readouterr().out


FAULTY = """
from lightning.pytorch.callbacks import Callback

class Logging(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.log("x", 3.0)  # Lightning refuses it in words

class Restoring(Callback):
    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        state["b"]

class Refusing(Callback):
    def __init__(self, size: int = 3):
        raise ValueError("size (3) must be even")
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("callback", "raised", "frame"),
    [
        ("Logging", MisconfigurationException, "pl_module.log"),
        ("Restoring", KeyError, 'state["b"]'),
    ],
)
def test_a_fault_in_a_callback_keeps_its_traceback_on_every_road_to_lightning(
    callback, raised, frame, workdir, monkeypatch
):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.syspath_prepend(str(workdir))
    Path("faulty.py").write_text(FAULTY)
    options = ["fit", "--config", config, *QUICK, "--trainer.max_steps=1", f"--trainer.callbacks+=faulty.{callback}"]
    options += ["--data.validation=null", "--trainer.default_root_dir=out/faulty"]
    if callback == "Restoring":
        assert run(*options) == 0
        options += ["--ckpt_path=last"]
    with pytest.raises(raised) as fault:
        run(*options)
    assert any(frame in (line.line or "") for line in traceback.extract_tb(fault.value.__traceback__))


@pytest.mark.filterwarnings("ignore")
def test_an_argument_that_a_users_class_refuses_is_one_line_with_option_and_class(workdir, monkeypatch, capsys):
    config = Path("configs/sft.yaml").absolute()
    monkeypatch.chdir(workdir)
    monkeypatch.syspath_prepend(str(workdir))
    Path("faulty.py").write_text(FAULTY)
    assert run("fit", "--config", config, *QUICK, "--trainer.callbacks=faulty.Refusing") == 2
    assert capsys.readouterr().err.endswith("error: --trainer.callbacks: faulty.Refusing: size (3) must be even\n")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("bf16-mixed", torch.float32)])
def test_weights_are_read_in_what_the_precision_holds_and_never_in_float32_first(
    precision, dtype, tmp_path, monkeypatch
):
    read = []
    load = loading.load_model

    def watched(*args, **kwargs):
        model = load(*args, **kwargs)
        read.append({parameter.dtype for parameter in model.parameters()})
        return model

    monkeypatch.setattr(loading, "load_model", watched)
    once = [f"--trainer.default_root_dir={tmp_path}", "--trainer.fast_dev_run=true", f"--trainer.precision={precision}"]
    assert run("fit", "--config", "configs/sft.yaml", *QUICK, *once) == 0
    assert read == [{dtype}] and torch.get_default_dtype() == torch.float32


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("strategy", "cut"), [("auto", False), ("lightning.pytorch.strategies.ModelParallelStrategy", True)]
)
def test_weights_are_left_as_they_are_in_files_where_the_strategy_will_cut_them(strategy, cut, tmp_path, monkeypatch):
    seen = []

    def stop(*args, **kwargs):
        seen.append(holding.UNCUT[-1])
        raise UserError("seen")

    monkeypatch.setattr(loading, "load_model", stop)
    options = [f"--trainer.default_root_dir={tmp_path}", f"--trainer.strategy={strategy}"]
    assert run("fit", "--config", "configs/sft.yaml", *QUICK, *options) == 2
    assert seen == [cut] and holding.UNCUT == [False]


@pytest.mark.filterwarnings("ignore")
def test_each_run_from_python_has_the_parser_of_its_own_command(capsys):
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit, match="0"):
            main.run([command, "--config=configs/sft.yaml", "--print_config"])
        assert "max_epochs" in capsys.readouterr().out
