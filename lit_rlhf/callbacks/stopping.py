"""A run that a signal ends keeps what it has learnt."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.signals import SIGNALS, Stop

NAME = "stopped.ckpt"


class GracefulStop(Callback):
    """On a signal write `stopped.ckpt` into the run's folder and end with `Stop`, on all ranks.

    The signals are SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is closed) and SIGXCPU (a limit of CPU time).
    `fit` ends after the optimiser step under way or, as one process, in the midst of a rollout or a validation, which
    the resumed run does anew; it goes on to the same bits. A second Ctrl-C ends it at once. Slurm's requeueing
    (SIGUSR1) is Lightning's, put off to such a moment. Where the Trainer keeps no checkpoints, none is written here.

    The command line has it last among the callbacks, so that what is due at the last step is still done. Lightning's
    own ways are not taken: on SIGTERM it ends `fit` without an error, its ranks in the midst of other exchanges; it
    saves (`ModelCheckpoint.save_on_exception`, requeueing) in the midst of a step, whose micro-batch is then lost.
    """

    def __init__(self) -> None:
        self.first_step = 0  # of this part of the run
        self.step = 0  # of the optimiser, so far
        self.finished = False
        self.listening, self.validation = ExitStack(), ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen, where the command line does not already: once Lightning has noted whose the handlers were before.

        It gives them back when it ends, which is after this callback.
        """
        if SIGNALS.process is None:
            self.listening.enter_context(SIGNALS.listening(at_once=False))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has just taken the signals."""
        SIGNALS.take_over()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As above."""
        SIGNALS.take_over()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As above."""
        SIGNALS.take_over()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on there is something to lose."""
        SIGNALS.take_over()
        SIGNALS.deferring = True
        self.first_step = self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop after an optimiser step; where a validation or the end of an epoch is due, as they or the next begin."""
        stepped, self.step = trainer.global_step > self.step, trainer.global_step
        epoch = trainer.fit_loop.epoch_loop
        due = trainer.is_last_batch or epoch._should_check_val_fx(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]
        if stepped and not due:
            SIGNALS.obey(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop here, or at any moment of the validation."""
        SIGNALS.take_over()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validation.enter_context(SIGNALS.interruptible(trainer))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What follows on it (checkpoints) is not done again."""
        self.validation.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The model is exported."""
        self.finished = True

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Obey a signal that came when there was nothing left to stop."""
        SIGNALS.deferring = False
        if SIGNALS.received:
            raise Stop(SIGNALS.received)
        self.listening.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the checkpoint; any other exception than `Stop` is none of ours."""
        self.validation.close()
        if isinstance(exception, Stop):
            exception.told = f"{exception} {self.keep(trainer)}"
        SIGNALS.deferring = False
        self.listening.close()

    def keep(self, trainer: Trainer) -> str:
        """Write the checkpoint where there is something to keep; returns what has been ended and how it goes on."""
        if trainer.state.fn != TrainerFn.FITTING:
            return f"ended {trainer.state.fn}"
        if self.finished:
            return "came when the run had finished; its model is exported"
        if self.step == self.first_step:
            how = f"with --ckpt_path={trainer.ckpt_path}, as it did" if trainer.ckpt_path else "anew"
            return f"ended the run before it took a step; no model was exported. It starts {how}"
        ended = f"ended the run after step {self.step}; no model was exported"
        if trainer.fast_dev_run or not trainer.checkpoint_callbacks:  # type: ignore[attr-defined]
            return f"{ended}, and no checkpoint written, since trainer.enable_checkpointing is false. It starts anew"
        if trainer.validating:
            begin_anew(trainer.fit_loop.epoch_loop.val_loop.batch_progress)
        file = Path(trainer.default_root_dir) / NAME
        try:
            trainer.save_checkpoint(file, weights_only=False)
        except OSError as error:
            return f"{ended}, and no checkpoint written: {error}. It goes on with --ckpt_path=last, its newest"
        return f"{ended}. It goes on from there with --ckpt_path={file}"


def begin_anew(progress: Any) -> None:
    """Have Lightning's restored loop do the whole of a validation that was under way.

    Left alone, it counts what was done, and then does the first of the batches as if they were the rest.
    """
    progress.current.reset()
    done = progress.total.completed
    progress.total.ready = progress.total.started = done + 1
    progress.total.processed = done
