"""Direct preference optimisation: the policy is its own reward model."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.preference import response_logprobs
from lit_rlhf.algorithms.preference_loss import KeepsPairLoss, LossTerm, PreferenceLoss
from lit_rlhf.algorithms.referenced import ReferencedModule
from lit_rlhf.data.batches import PreferenceBatch
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import named_by, require
from lit_rlhf.losses import dpo_loss
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import Reference


class DPO(KeepsPairLoss, ReferencedModule):
    """Direct preference optimisation: minimise -log σ(β[log π/π_ref(y_w) - log π/π_ref(y_l)]).

    Rafailov et al. 2023, Eq. 7, https://arxiv.org/abs/2305.18290

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model.
        beta: strength of the pull towards the reference; the paper uses 0.1 to 0.5.
        loss: any of the preference losses in `lit_rlhf.losses`, by its import path; or a list of terms, each with a
            function, a weight and options.
        reference_free: no reference, as if it were uniform: the implicit reward is β log π.
        ld_alpha: LD-DPO: how much of the tokens of a response beyond the length of the other one counts; 1 = all of it,
            0 = nothing (`desensitized`).
        kwargs: where the reference lives, see `ReferencedModule`; the optimiser's settings, see `AlignmentModule`.
    """

    prefix = "dpo"

    def __init__(
        self,
        policy: str = "demo",
        beta: float = 0.1,
        loss: list[LossTerm] | Callable[..., Any] = dpo_loss,
        reference_free: bool = False,
        ld_alpha: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, reference_free=reference_free, **kwargs)
        require(0 < beta < math.inf, "beta", beta, "more than 0 (at 0 every policy has the same loss) and finite")
        require(0 <= ld_alpha <= 1, "ld_alpha", ld_alpha, "between 0 and 1 (1 = plain sums)")
        self.ld_alpha = ld_alpha
        self.read_as = "" if ld_alpha == 1 else f" ld_alpha={ld_alpha}"
        with named_by("model.loss"):
            self.loss = PreferenceLoss(loss, reference_free)
        self.beta = beta

    def training_step(self, batch: PreferenceBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the preference loss of its pairs."""
        return self.pair_losses(batch, "train").sum() / batch.denominator

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        """Log loss, implicit rewards and their accuracy, as means over all pairs."""
        self.pair_losses(batch, stage)

    def pair_losses(self, batch: PreferenceBatch, stage: str) -> Tensor:
        """(B,) losses of the pairs, logged."""
        chosen, rejected = self.logprobs_of(self.policy, batch.packed).chunk(2)
        balance = self.balance_term("policy", len(chosen))
        ref_chosen, ref_rejected = self.reference_logprobs(batch.packed, batch.row_ids, stage).chunk(2)
        inputs = self.loss.inputs_from(batch)
        losses = self.loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, **inputs) + balance

        chosen_rewards, rejected_rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        if stage == "train":
            self.loss.observe((chosen_rewards + rejected_rewards) / 2)
        self.log_rewards(stage, batch, losses, (chosen, rejected), (chosen_rewards, rejected_rewards))
        return losses

    @property
    def reads_margins(self) -> bool:
        """Whether the loss takes in the margins of the data."""
        return "margin" in self.loss.inputs

    def row_logprobs(self, reference: Reference, batch: PreferenceBatch) -> Tensor:
        """(B, 2) log π_ref of chosen and rejected responses."""
        return self.logprobs_of(reference, batch.packed).view(2, -1).T

    def logprobs_of(self, network: Policy | Reference, packed: PackedBatch) -> Tensor:
        """(2B,) log-probs of chosen and rejected responses; what is longer than the other one counts `ld_alpha`."""
        return response_logprobs(network, packed, self.ld_alpha)
