"""What is logged: means over the micro-batches of an optimiser step, or over an epoch, of all ranks.

By hand, since torchmetrics' `MeanMetric` has each metric exchanged by itself: here all of a step go in one exchange.
"""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.losses.advantages import Moments, masked_moments

# What the progress bar and the lines show, by its last name; TensorBoard has everything.
PROGRESS = ("loss", "accuracy", "score", "reward_accuracy", "reward_margin")


class MetricsModule(LightningModule):
    """A module that logs means, and sums over ranks."""

    def __init__(self) -> None:
        super().__init__()
        # Of the optimiser step's micro-batches so far, by metric: weighted sum and weight.
        self.step_sums: dict[str, tuple[Tensor, int]] = {}
        self.watched: dict[str, list[Tensor]] | None = None  # values whose spread is asked for; None = nobody asks

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Sum of a tensor over all ranks, back on the CPU."""
        return self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum").cpu()

    def most_of_ranks(self, counts: Tensor) -> Tensor:
        """The greatest of all ranks' values, one by one, back on the CPU."""
        return self.trainer.strategy.reduce(counts.to(self.device), reduce_op="max").cpu()

    def mean_over_ranks(self, metrics: dict[str, Tensor]) -> dict[str, float]:
        """Means of scalars over all ranks, which weigh alike."""
        sums = self.sum_over_ranks(torch.stack([value.double() for value in metrics.values()]))
        return dict(zip(metrics, (sums / self.trainer.world_size).tolist(), strict=True))

    def moments_over_ranks(self, values: Tensor) -> Moments:
        """Sum, sum of squares and number of the values of all ranks."""
        return Moments(*self.sum_over_ranks(torch.stack(masked_moments(values))))

    def log_mean(self, stage: str, metrics: dict[str, Tensor], weight: int) -> None:
        """Log means of a micro-batch, averaged by their weight: in training over the optimiser step, else the epoch.

        Args:
            stage: train, val or test.
            metrics: means; a name with a slash stands as it is, any other is logged as `stage`/name.
            weight: how many items each is a mean over, of the kind that the loss is a mean over where it is the loss.
        """
        for name, value in metrics.items():
            tag = name if "/" in name else f"{stage}/{name}"
            if stage == "train":
                total, count = self.step_sums.get(tag, (0.0, 0))
                self.step_sums[tag] = (total + value.float() * weight, count + weight)
            else:
                in_bar = name.rpartition("/")[2] in PROGRESS
                self.log(tag, value, batch_size=weight, on_step=False, on_epoch=True, sync_dist=True, prog_bar=in_bar)

    def watch(self, spreads: dict[str, Tensor]) -> None:
        """Keep values of this rank whose mean says too little, where a histogram is due.

        Args:
            spreads: values of any shape, by the name of what they are.
        """
        if self.watched is not None:
            for name, values in spreads.items():
                self.watched.setdefault(name, []).append(values.detach().float().flatten().cpu())

    def log_step(self) -> None:
        """Log the training metrics of an optimiser step: means over its micro-batches on all ranks, in one exchange."""
        if not self.step_sums:
            return
        totals, weights = zip(*self.step_sums.values(), strict=True)
        sums = torch.stack([torch.stack(totals), torch.tensor(weights, dtype=torch.float32, device=self.device)])
        totals, weights = self.trainer.strategy.reduce(sums, reduce_op="sum")
        for tag, mean in zip(self.step_sums, totals / weights.clamp(min=1), strict=True):
            self.log(tag, mean, prog_bar=tag.rpartition("/")[2] in PROGRESS)
        self.step_sums = {}
