"""How weights move: optimiser and schedule, clipping, the step that is not taken, and the balance of experts."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from inspect import signature
from typing import Any, ClassVar

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from lit_rlhf.algorithms.hyperparameters import plain_arguments
from lit_rlhf.algorithms.lightning_tools import scales_gradients, take_rate, take_scheduled_rate
from lit_rlhf.algorithms.load_balance import LoadBalance, find_load_balance
from lit_rlhf.algorithms.metrics import MetricsModule
from lit_rlhf.algorithms.optimizers import Change, changes, make_optimizer, require_own_state, take_options
from lit_rlhf.algorithms.planned_steps import planned_steps
from lit_rlhf.algorithms.settings import OptimizerSettings
from lit_rlhf.algorithms.strategies import norm_of_own_step, steps_by_itself
from lit_rlhf.engine.sharding import total_norm
from lit_rlhf.errors import UserError
from lit_rlhf.losses import load_balancing_loss
from lit_rlhf.models.network import Network

FEW_STEPS = 20  # of which one is a share worth a word


class LearningModule(MetricsModule):
    """A module whose weights AdamW moves, along a schedule."""

    exported: ClassVar[str]
    optimizer_settings: OptimizerSettings
    # Apart: Lightning's LearningRateFinder sets the first of these; optimisers are made with the second.
    learning_rate: float
    rate_in_use: float

    def __init__(self) -> None:
        super().__init__()
        self.resumed: dict[str, Any] | None = None  # a checkpoint, until the optimiser is there
        self.changed: dict[str, Change] = {}  # options of the optimiser, from the checkpoint's run to this one
        self.made: list[dict[str, Any]] = []  # groups of the optimiser as they were made, without parameters
        self.planned_steps: float | None = None  # of the optimiser, up to the end of the run
        self.load_balance: dict[str, LoadBalance] = {}  # of mixtures of experts that learn, by the network's name

    def find_load_balance(self) -> None:
        """Look at each network that learns: whether its config asks for its experts to be balanced."""
        found = {role: find_load_balance(part) for role, part in self.named_children() if isinstance(part, Network)}
        self.load_balance = {role: balance for role, balance in found.items() if balance is not None}

    def balance_term(self, role: str, weight: int, told: bool = True) -> Tensor | float:
        """() what the load-balancing loss of the pass just made adds to the mean loss; 0.0 where none is asked for.

        Args:
            role: name of the network that has learnt in it.
            weight: how many items of the loss this micro-batch holds.
            told: log the loss itself, without its coefficient.
        """
        balance = self.load_balance.get(role)
        if balance is None or not torch.is_grad_enabled():
            return 0.0
        network = getattr(self, role)
        uneven = load_balancing_loss(torch.cat(network.routers), balance.top_k)
        network.routers = ()
        if told:
            name = "load_balancing_loss" if role == self.exported else f"{role}_load_balancing_loss"
            self.log_mean("train", {name: uneven.detach()}, weight=weight)
        return balance.coef * uneven

    def configure_optimizers(self) -> Any:
        """AdamW with decay on matrices only, and the schedule stepped after each optimiser step."""
        # One kernel for the whole step. Lightning clips fp16 gradients before a fused step would unscale them.
        fused = not scales_gradients(self.trainer)
        settings = self.optimizer_settings
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise UserError(
                "all weights are frozen (requires_grad is False), so that nothing can be learnt: leave some"
            )
        optimizer = make_optimizer(settings, self.parameter_groups(), self.modules(), fused)
        self.rate_in_use = self.learning_rate
        self.planned_steps = total = planned_steps(self.trainer, self.resumed)
        if math.isinf(total):
            if settings.lr_scheduler != "constant" or 0 < settings.warmup_steps < 1:
                raise UserError(
                    f"lr_scheduler {settings.lr_scheduler!r} and a warm-up share need an end: set trainer.max_epochs "
                    "or trainer.max_steps, or use lr_scheduler: constant with warmup_steps in steps"
                )
            total = 0
        warmup = math.ceil(settings.warmup_steps * total) if settings.warmup_steps < 1 else int(settings.warmup_steps)
        if 0 < total <= warmup:
            rank_zero_info(f"warmup_steps ({warmup}) is all of the {int(total)} steps: learning_rate is never reached")
        elif warmup and 0 < total < FEW_STEPS:
            rank_zero_info(
                f"warmup_steps: the rate begins at 0, so that the first of the {int(total)} steps moves nothing"
            )
        name = "constant_with_warmup" if settings.lr_scheduler == "constant" else settings.lr_scheduler
        schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=int(total))
        self.made = [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        if self.resumed is not None:
            require_own_state(self.resumed, optimizer, schedule, str(self.trainer.ckpt_path))
            self.resumed = None
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """As Lightning clips; which in mixed precision refuses a fused optimiser, as if bfloat16 were scaled too."""
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or GradClipAlgorithmType.NORM)
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What AdamW optimises, with learning rates and decay."""
        return self.optimizer_settings.groups(self.parameters(), self.learning_rate)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log this step, gradient norm before clipping included; refuse one that would write NaN into the weights."""
        self.log_step()
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        if steps_by_itself(self.trainer):
            return
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = total_norm(gradients)
        if not scales_gradients(self.trainer) and not torch.isfinite(norm):  # there inf means "scale down"
            raise UserError(
                f"the gradient norm is {norm.item()} at step {self.global_step}: no step was taken and the weights are "
                "as they were; if earlier steps have ruined them already, go back to an older checkpoint. Lower "
                "learning_rate, set trainer.gradient_clip_val, or look for outliers in the data"
            )
        self.log("train/grad_norm", norm)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The same of a strategy that sums gradients within its step: it is known once the step was taken.

        Raises:
            UserError: it has written NaN into the weights.
        """
        if steps_by_itself(self.trainer):
            norm = norm_of_own_step(self.trainer)
            if not torch.isfinite(norm):
                raise UserError(
                    f"the gradient norm was {norm.item()} at step {self.global_step}, which has ruined the weights: go "
                    "back to an older checkpoint. Lower learning_rate, set trainer.gradient_clip_val, or look for "
                    "outliers in the data"
                )
            self.log("train/grad_norm", norm)

    def optimizer_options(self) -> dict[str, Any]:
        """What was asked of optimiser and schedule, as plain values; a rate that was found later is no option."""
        return plain_arguments(asdict(self.optimizer_settings))

    def note_changes(self, checkpoint: Mapping[str, Any], file: str) -> None:
        """Know which options of the optimiser are other than those of a checkpoint's run."""
        given = checkpoint.get("optimizer_options")
        if given is None:  # of a version that kept the arguments alone, without those left at their defaults
            given = checkpoint.get("hyper_parameters", {})
            if isinstance(given, Mapping) and given:
                named = [p for base in reversed(type(self).__mro__) for p in signature(base).parameters.values()]
                given = {**plain_arguments({p.name: p.default for p in named}), **given}
        self.changed = changes(given, self.optimizer_options(), file)

    def take_own_options(self, file: str) -> None:
        """Go on with the options of this run where a checkpoint has brought others."""
        if not self.changed or not self.made:  # made by a subclass
            return
        for optimizer, plan in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            take_options(optimizer, plan.scheduler, self.made, self.changed)
        told = ", ".join(f"{name} {now} (it was {before})" for name, (before, now) in self.changed.items())
        rank_zero_info(f"ckpt_path: {file} goes on with options of this run: {told}")
        self.changed = {}

    def take_found_rate(self) -> None:
        """Go on at a rate that LearningRateFinder has set, or at the one that this run's own schedule has here."""
        if self.learning_rate != self.rate_in_use:  # set by LearningRateFinder
            schedule = self.trainer.lr_scheduler_configs[0].scheduler
            take_rate(self.trainer.optimizers[0], schedule, self.rate_in_use, self.learning_rate)
            self.rate_in_use = self.learning_rate
        elif self.trainer.global_step:
            for plan in self.trainer.lr_scheduler_configs:
                if isinstance(plan.scheduler, LambdaLR):
                    take_scheduled_rate(plan.scheduler.optimizer, plan.scheduler)
