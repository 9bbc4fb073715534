"""A signal ends a run where nothing is half done, and what it leaves goes on to the bits of a run never stopped."""

import os
import signal

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from lit_rlhf.callbacks import GracefulStop
from lit_rlhf.cli.checkpoints import WholeCheckpointIO
from lit_rlhf.rollout.play import RolloutBackend
from lit_rlhf.signals import SIGNALS, Stop
from tests.stages import make_stage, make_trainer

MOMENTS = {  # of a signal: the first call of a hook of the Trainer of which something holds
    "in the midst of a step": ("on_before_optimizer_step", lambda trainer: trainer.global_step == 1),
    "at an epoch's last step": ("on_after_backward", lambda trainer: trainer.is_last_batch),
    "as a validation starts": ("on_validation_start", lambda trainer: not trainer.sanity_checking),
    "in the midst of a validation": ("on_validation_batch_end", lambda trainer: trainer.global_step > 2),
    "as a validation ends": ("on_validation_end", lambda trainer: trainer.global_step > 0),
    "between epochs": ("on_train_epoch_end", lambda trainer: True),
    "as an epoch starts": ("on_train_epoch_start", lambda trainer: trainer.current_epoch == 1),
}


class Sends(Callback):
    """Sends this process a signal."""

    def __init__(self, hook, condition, number=signal.SIGTERM):
        self.condition, self.number, self.sent = condition, number, False
        setattr(self, hook, self.called)

    def called(self, trainer, *args):
        if not self.sent and self.condition(trainer):
            self.sent = True
            os.kill(os.getpid(), self.number)


class Diary(Callback):
    """What was validated and which rollouts were learnt from, step by step."""

    def __init__(self):
        self.lines = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            known = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            self.lines.append((trainer.global_step, known))

    def on_train_epoch_end(self, trainer, pl_module):
        self.lines.append((trainer.global_step, dict(getattr(pl_module, "rollout_metrics", {}))))


def fit(stage, inputs, folder, ckpt_path=None, sends=None, checkpoints=True, **options):
    """Two epochs, validated at their ends and (but for PPO) midst; checkpoints by what validation says."""
    torch.manual_seed(0)  # of PPO's critic
    module, data = make_stage(stage, inputs)
    diary = Diary()
    best = ModelCheckpoint(dirpath=folder, filename="{step}", monitor="val/score" if stage == "ppo" else "val/loss")
    callbacks = [diary, *([sends] if sends else []), *([best] if checkpoints else [])]
    every = {} if stage == "ppo" else {"val_check_interval": 2}
    options = {"max_epochs": 2, "limit_val_batches": None, "num_sanity_val_steps": 1} | every | options
    options |= {"enable_checkpointing": checkpoints, "plugins": [WholeCheckpointIO()]}
    trainer = make_trainer(folder, callbacks=callbacks, **options)
    trainer.callbacks.append(GracefulStop())
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer, diary.lines, best


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory):
    """Of each stage, what came of a run that no signal met."""
    runs = {}

    def of(stage):
        if stage not in runs:
            runs[stage] = fit(stage, inputs, tmp_path_factory.mktemp(stage))
        return runs[stage]

    return of


def goes_on_as_if_undisturbed(whole_run, stage, inputs, folder, checkpoint="stopped.ckpt"):
    """Whether the run that goes on from what a signal left comes to the same."""
    whole, trainer, lines, best = whole_run
    resumed, resumed_trainer, more, resumed_best = fit(stage, inputs, folder, folder / checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert more == lines[len(lines) - len(more) :]
    assert resumed_trainer.global_step == trainer.global_step
    assert resumed_best.best_model_score == best.best_model_score
    assert (folder / resumed_best.best_model_path).exists()


def ended(told, folder):
    """The step after which a run says that it was ended."""
    step = torch.load(folder / "stopped.ckpt", weights_only=True)["global_step"]
    assert f"ended the run after step {step}; no model was exported. It goes on from there with --ckpt_path=" in told
    assert told.endswith(f"={folder}/stopped.ckpt")
    return step


@pytest.mark.parametrize(
    ("stage", "moment"),
    [
        *(("sft", moment) for moment in MOMENTS),
        ("ppo", "in the midst of a step"),
        *(pytest.param("ppo", moment, marks=pytest.mark.slow) for moment in list(MOMENTS)[1:]),
    ],
)
def test_a_run_that_a_signal_ends_goes_on_as_if_it_had_not(undisturbed, inputs, tmp_path, stage, moment):
    whole_run = undisturbed(stage)
    with pytest.raises(Stop, match="SIGTERM") as stop:
        fit(stage, inputs, tmp_path, sends=Sends(*MOMENTS[moment]))
    assert stop.value.status == 143
    assert 0 < ended(stop.value.told, tmp_path) < whole_run[1].global_step
    goes_on_as_if_undisturbed(whole_run, stage, inputs, tmp_path)


def test_a_run_that_a_signal_ends_in_a_rollout_plays_it_anew_when_it_goes_on(
    undisturbed, inputs, tmp_path, monkeypatch
):
    whole_run, real, calls = undisturbed("ppo"), RolloutBackend.play, []

    def interrupted(self, policy, env, *args, **options):
        calls.append(env)
        if len(calls) == 2:
            step, steps = env.step, iter(range(5))
            env.step = lambda actions: step(actions) if next(steps) < 4 else os.kill(os.getpid(), signal.SIGINT)
        return real(self, policy, env, *args, **options)

    monkeypatch.setattr(RolloutBackend, "play", interrupted)
    with pytest.raises(Stop, match="SIGINT") as stop:
        fit("ppo", inputs, tmp_path)
    assert stop.value.status == 130 and ended(stop.value.told, tmp_path) == 4
    goes_on_as_if_undisturbed(whole_run, "ppo", inputs, tmp_path)
    assert len(calls) == 2 + 1


def test_accumulated_gradients_are_not_lost(inputs, tmp_path):
    options = {"accumulate_grad_batches": 2, "val_check_interval": 1.0}
    whole_run = fit("sft", inputs, tmp_path / "whole", **options)
    midst = Sends("on_train_batch_end", lambda trainer: trainer.fit_loop.epoch_loop.batch_idx == 0)
    with pytest.raises(Stop) as stop:
        fit("sft", inputs, tmp_path, sends=midst, **options)
    assert ended(stop.value.told, tmp_path) == 1
    module, *_ = fit("sft", inputs, tmp_path, tmp_path / "stopped.ckpt", **options)
    for name, value in whole_run[0].state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_slurm_requeues_the_job_from_a_checkpoint_between_steps_and_the_run_goes_on_meanwhile(
    undisturbed, inputs, tmp_path, monkeypatch
):
    whole_run = undisturbed("sft")
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"NTASKS": "1", "JOB_ID": "77", "JOB_NAME": "sft", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    hook, condition = MOMENTS["in the midst of a step"]
    _, trainer, *_ = fit("sft", inputs, tmp_path, sends=Sends(hook, condition, signal.SIGUSR1))
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert trainer.global_step == whole_run[1].global_step
    assert torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"] < trainer.global_step
    goes_on_as_if_undisturbed(whole_run, "sft", inputs, tmp_path, "hpc_ckpt_1.ckpt")


NOTHING_KEPT = {  # a moment and options -> what is told
    "before the first step": (
        ("on_train_batch_start", lambda trainer: True),
        {"accumulate_grad_batches": 100},
        "SIGTERM ended the run before it took a step; no model was exported. It starts anew",
    ),
    "in the check of the validation": (
        ("on_validation_batch_end", lambda trainer: trainer.sanity_checking),
        {},
        "SIGTERM ended the run before it took a step; no model was exported. It starts anew",
    ),
    "where no checkpoints are kept": (
        MOMENTS["in the midst of a step"],
        {"checkpoints": False},
        "no checkpoint written, since trainer.enable_checkpointing is false. It starts anew",
    ),
    "after the last step": (
        ("on_train_end", lambda trainer: True),
        {},
        "SIGTERM came when the run had finished; its model is exported",
    ),
}


@pytest.mark.parametrize("case", NOTHING_KEPT)
def test_a_run_that_has_nothing_to_keep_says_so(inputs, tmp_path, case):
    moment, options, told = NOTHING_KEPT[case]
    with pytest.raises(Stop) as stop:
        fit("sft", inputs, tmp_path, sends=Sends(*moment), **options)
    assert stop.value.told.endswith(told)
    assert not (tmp_path / "stopped.ckpt").exists()


def test_a_disk_that_is_full_leaves_the_newest_checkpoint_to_go_on_from(inputs, tmp_path):
    (tmp_path / "stopped.ckpt").mkdir()  # as good a reason for an OSError as any
    with pytest.raises(Stop) as stop:
        fit("sft", inputs, tmp_path, sends=Sends(*MOMENTS["in the midst of a step"]))
    assert "no checkpoint written: " in stop.value.told
    assert stop.value.told.endswith(" It goes on with --ckpt_path=last, its newest")


def test_signals_are_the_program_s_own_again_after_a_run(inputs, tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    fit("sft", inputs, tmp_path, max_steps=1)
    with pytest.raises(Stop):
        fit("sft", inputs, tmp_path, sends=Sends(*MOMENTS["in the midst of a step"]))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert SIGNALS.process is None and not SIGNALS.deferring
