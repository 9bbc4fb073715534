"""A word when a run goes wrong in a way that is known."""

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.alarm_rules import Curve, alarms
from lit_rlhf.errors import require_types

MOST = 1000  # points of a curve that are kept


class Alarms(Callback):
    """Say once of each thing that goes wrong what was seen, since when, and what people do about it.

    The rules, with their thresholds, are those of `lit-rlhf doctor` (docs/doctor.md). They look at the metrics as they
    stand at the end of each epoch, on policy of each iteration, and of each validation.

    Args:
        watch: say so; false = no alarms.
    """

    def __init__(self, watch: bool = True) -> None:
        require_types(Alarms.__init__, locals())
        self.watch = watch
        self.curves: dict[str, Curve] = {}
        self.told: set[tuple[str, str]] = set()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what was validated."""
        if not trainer.sanity_checking:
            self.look(trainer, "val/")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what was learnt."""
        self.look(trainer, "")

    def look(self, trainer: Trainer, kind: str) -> None:
        """Take the metrics of a kind into the curves, and tell of what has not been told."""
        if not self.watch or not trainer.is_global_zero:
            return
        for tag, value in trainer.callback_metrics.items():
            held_out = tag.startswith("val/")
            if held_out == (kind == "val/") and math.isfinite(number := float(value)):
                steps, values = self.curves.get(tag, Curve([], []))
                self.curves[tag] = Curve([*steps, trainer.global_step][-MOST:], [*values, number][-MOST:])
        for alarm in alarms(self.curves):
            if (alarm.rule, alarm.tag) not in self.told:
                self.told.add((alarm.rule, alarm.tag))
                rank_zero_warn(str(alarm))
