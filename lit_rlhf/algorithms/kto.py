"""Kahneman-Tversky optimisation: completions by themselves, desirable or not."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.algorithms.preference import response_logprobs
from lit_rlhf.algorithms.referenced import ReferencedModule
from lit_rlhf.data.batches import Mismatched, UnpairedBatch
from lit_rlhf.errors import damaged, require, require_alike
from lit_rlhf.losses import kto_loss, mismatched_kl
from lit_rlhf.models.roles import Reference

CLASSES = ("undesirable", "desirable")


class Seen(NamedTuple):
    """What is known of the B completions of a micro-batch."""

    desirable: Tensor  # (B,) bool
    logratios: Tensor  # (B,) log π/π_ref
    logprobs: Tensor  # (B,) log π
    lengths: Tensor  # (B,) float32: response tokens


class KTO(ReferencedModule):
    """Kahneman-Tversky optimisation: minimise λ_D (1 - σ(β (h - z₀))), of undesirable ones λ_U (1 - σ(β (z₀ - h))).

    Ethayarajh et al. 2024, Eq. 7, https://arxiv.org/abs/2402.01306, with h = log π/π_ref(y|x).

    z₀ estimates KL(π‖π_ref) from completions behind prompts that are not their own: those of the whole optimiser step,
    on all ranks, before its first micro-batch is learnt from. So no split of a step changes its gradient. It carries
    none, and is 0 at least.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model.
        beta: how soon a gain or a loss counts in full; the paper uses 0.1.
        desirable_weight: λ_D; with n of each class, λ_D n_D / (λ_U n_U) should lie between 1 and 4/3 (the paper's
            Eq. 8), and a warning says where it does not.
        undesirable_weight: λ_U.
        kwargs: where the reference lives, see `ReferencedModule`; the optimiser's settings, see `AlignmentModule`.
    """

    learns_from = "unpaired"

    def __init__(
        self,
        policy: str = "demo",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, reference_free=False, **kwargs)
        require(0 < beta < math.inf, "beta", beta, "more than 0 (at 0 every policy has the same loss) and finite")
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, weight in weights.items():
            require(0 < weight < math.inf, name, weight, "more than 0 and finite")
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.kl = torch.zeros(())  # z₀ of the optimiser step under way
        self.seen: list[Seen] = []  # in the optimiser step, or the evaluation, under way
        self.mismatched: list[Tensor] = []  # log-ratios of the evaluation under way

    def training_step(self, batch: UnpairedBatch, batch_idx: int) -> Tensor:
        """One micro-batch; before the first of an optimiser step, z₀ of the step."""
        if batch.mismatched:
            self.kl = self.kl_of([self.mismatched_logratios(part, "train") for part in batch.mismatched])
        seen = self.look_at(batch, "train")
        losses = self.losses(seen) + self.balance_term("policy", len(seen.desirable))
        self.seen.append(Seen(*(column.detach() for column in seen)))
        self.log_mean("train", {"loss": losses.detach().mean()}, weight=len(losses))
        return losses.sum() / batch.denominator

    def evaluate(self, batch: UnpairedBatch, stage: str) -> None:
        """Keep what is known of the completions: their losses are known once z₀ of all is."""
        self.mismatched += [self.mismatched_logratios(part, stage) for part in batch.mismatched]
        self.seen.append(self.look_at(batch, stage))

    def look_at(self, batch: UnpairedBatch, stage: str) -> Seen:
        """What policy and reference say of the completions."""
        logprobs = response_logprobs(self.policy, batch.packed)
        reference = self.reference_logprobs(batch.packed, batch.row_ids, stage, columns=(0,))
        return Seen(batch.desirable, logprobs - reference, logprobs, batch.packed.response_lengths)

    @torch.no_grad()
    def mismatched_logratios(self, part: Mismatched, stage: str) -> Tensor:
        """(B,) log π/π_ref of responses behind prompts that are not their own."""
        reference = self.reference_logprobs(part.packed, part.row_ids, stage, columns=(1,))
        return response_logprobs(self.policy, part.packed) - reference

    def kl_of(self, logratios: list[Tensor]) -> Tensor:
        """() z₀ from the log-ratios of mismatched responses, (B,) each, of all ranks."""
        mine = torch.cat(logratios)
        sums = torch.stack([mine.sum(), mine.new_tensor(float(len(mine)))])
        return mismatched_kl(*self.trainer.strategy.reduce(sums, reduce_op="sum"))

    def losses(self, seen: Seen) -> Tensor:
        """(B,) losses."""
        weights = self.desirable_weight, self.undesirable_weight
        zeros = torch.zeros_like(seen.logratios)
        return kto_loss(seen.logratios, zeros, seen.desirable, self.beta, self.kl.to(zeros.device), *weights)

    def row_logprobs(self, reference: Reference, batch: UnpairedBatch) -> Tensor:
        """(B, 2) log π_ref of completions behind their own prompts, and of others behind these."""
        (mismatched,) = batch.mismatched
        return torch.stack([response_logprobs(reference, part.packed) for part in (batch, mismatched)], dim=1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log what the classes have come to in this step."""
        super().on_before_optimizer_step(optimizer)
        self.log("kto/kl", self.kl)
        self.log_classes("train")

    def on_validation_epoch_end(self) -> None:
        """Log the loss over all held-out completions, by z₀ of all."""
        self.report("val")
        super().on_validation_epoch_end()

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self.report("test")

    def report(self, stage: str) -> None:
        """Log what an evaluation has come to, on all ranks."""
        if not self.seen:
            return
        in_training, self.kl = self.kl, self.kl_of(self.mismatched)
        losses = torch.cat([self.losses(seen) for seen in self.seen])
        total, count = self.sum_over_ranks(torch.stack([losses.sum(), losses.new_tensor(float(len(losses)))]))
        self.log(f"{stage}/loss", total / count, prog_bar=True, sync_dist=True)  # the same on all ranks
        self.log(f"{stage}/kl", self.kl, sync_dist=True)
        self.log_classes(stage)
        self.kl, self.mismatched = in_training, []

    @torch.no_grad()
    def log_classes(self, stage: str) -> None:
        """Log means over the completions of each class on all ranks; nothing of a class that none of them has.

        Args:
            stage: train, val or test.
        """
        desirable, logratios, logprobs, lengths = (torch.cat(column) for column in zip(*self.seen, strict=True))
        self.seen = []
        columns = torch.stack([torch.ones_like(lengths), self.beta * logratios, logprobs, lengths])
        sums = torch.stack([(columns * (desirable == of)).sum(1) for of in (False, True)])
        prefix = "kto" if stage == "train" else stage
        means: dict[str, float] = {}
        of_all = self.sum_over_ranks(sums.flatten()).view(2, -1).tolist()
        for name, (count, *totals) in zip(CLASSES, of_all, strict=True):
            if count:
                named = zip(("reward", "logprobs", "length"), totals, strict=True)
                means |= {f"{name}_{what}": total / count for what, total in named}
        if {f"{name}_reward" for name in CLASSES} <= means.keys():
            means["reward_margin"] = means["desirable_reward"] - means["undesirable_reward"]
        for name, mean in means.items():
            self.log(f"{prefix}/{name}", mean, prog_bar=name == "reward_margin")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep z₀: a checkpoint may be of the middle of an optimiser step."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl"] = self.kl.item()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take that of the run that goes on."""
        super().on_load_checkpoint(checkpoint)
        require_alike(checkpoint.get("kl"), 0.0, damaged(self.resumed_file, "kl"))
        self.kl = torch.tensor(checkpoint["kl"])
