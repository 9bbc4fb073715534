"""What the loggers are told of a run as a whole: its settings beside its results, and the pages of its curves."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_FLOAT64
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.tensorboard.summary import hparams

from lit_rlhf.algorithms.hyperparameters import plain, settings_of
from lit_rlhf.callbacks.boards import OVER, layout
from lit_rlhf.data.batches import NoBatch, RolloutBatch

OF_THE_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "world_size")
RESULTS = ("train/loss", "rollout/score", "rollout/kl")  # shown beside the settings, with all of val/
# Of settings and results TensorBoard shows five each unasked: these, where the stage has them.
FIRST_SETTINGS = ("beta", "clip_range", "kl/init_args/kl_coef", "learning_rate", "trainer/max_epochs")
FIRST_RESULTS = tuple(f"val/{name}" for name in ("score", "kl", "reward_accuracy", "accuracy", "reward_margin", "loss"))
LONGEST = 200  # characters of a setting that are shown, as of a chat template


class Dashboard(Callback):
    """Give TensorBoard the settings of the run beside its metrics (HParams) and pages of curves (Custom Scalars).

    Other loggers, such as W&B and MLflow, have the module's settings by Lightning and get those of data and Trainer in
    their config here. Both tabs are written once, when the run has logged each of its metrics: they follow the curves
    from then on, to the last value.
    """

    def __init__(self) -> None:
        self.held_out: set[str] = set()  # metrics of a validation before training, which Lightning forgets
        self.first_step = 0  # since when this run has trained
        self.written = False

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The names of what is validated."""
        self.held_out = set(trainer.callback_metrics)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand on the settings of data and Trainer where they go into one config with those of the module."""
        self.written, self.first_step = False, trainer.global_step
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger | CSVLogger):  # these have the run's config.yaml beside them
                logger.log_hyperparams(settings_around(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Off policy, all metrics of training are there once Lightning has written them."""
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        step = trainer.global_step
        if every and step > self.first_step and step % every == 0 and not isinstance(batch, RolloutBatch | NoBatch):
            self.write(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """On policy, once the first rollout has been learnt from; each has its curves."""
        self.draw_rollout(trainer, getattr(pl_module, "rollout_metrics", {}))
        self.write(trainer, pl_module)

    def draw_rollout(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        """Points of curves over iterations and over episodes, by which runs of other sizes compare."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        iteration = trainer.current_epoch + 1
        for logger in trainer.loggers if metrics and trainer.is_global_zero else ():
            if isinstance(logger, TensorBoardLogger):
                for tag, value in metrics.items():
                    name = tag.rpartition("/")[2]
                    logger.experiment.add_scalar(f"{OVER}iterations/{name}", value, iteration)
                    logger.experiment.add_scalar(
                        f"{OVER}episodes/{name}", value, iteration * data.settings.rollout_size
                    )

    def write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pages and settings, where they are not there yet."""
        if self.written or not trainer.is_global_zero:
            return
        self.written = True
        tags = self.held_out | {name for name in trainer.callback_metrics if "/" in name}
        shown = [tag for tag in tags if tag.startswith("val/") or tag in RESULTS]
        flat = dict(flattened({**pl_module.hparams, **settings_around(trainer)}))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(tags))
                writer = logger.experiment._get_file_writer()
                for summary in summaries(flat, shown):
                    writer.add_summary(summary)


def summaries(settings: Mapping[str, bool | int | float | str], results: Collection[str]) -> tuple[Any, Any, Any]:
    """What the HParams tab reads: the columns, the settings of this run, and that it has ended well.

    The tab takes the columns of all its runs from one of them, whichever it finds first. So those of each run also name
    what comes first in runs of other stages.
    """
    first = [tag for tag in FIRST_RESULTS if tag in results]
    others = sorted(set(results) - set(first), key=lambda tag: (not tag.startswith("val/"), tag))
    of_other_stages = set(FIRST_RESULTS) - set(first)
    columns, start, end = hparams(dict(settings), dict.fromkeys([*first, *others, *sorted(of_other_stages)], 0.0))
    content = columns.value[0].metadata.plugin_data
    told = HParamsPluginData.FromString(content.content)
    for name in sorted(set(FIRST_SETTINGS) - settings.keys()):
        told.experiment.hparam_infos.add(name=name, type=DATA_TYPE_FLOAT64)
    for info in told.experiment.hparam_infos:
        info.differs = info.name in FIRST_SETTINGS  # between runs: such columns come first
    content.content = told.SerializeToString()
    return columns, start, end


def settings_around(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What was asked of data and Trainer, as plain values."""
    return {
        "data": settings_of(trainer.datamodule),  # type: ignore[attr-defined]
        "trainer": {name: plain(getattr(trainer, name)) for name in OF_THE_TRAINER},
    }


def flattened(settings: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Settings by their path, data/seed, as one value each; what is neither number nor truth is text."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{above}{name}/")
        else:
            yield f"{above}{name}", value if isinstance(value, bool | int | float) else f"{value!s:.{LONGEST}}"
