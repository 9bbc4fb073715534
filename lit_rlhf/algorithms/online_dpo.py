"""Online DPO: the policy writes the pairs that it learns from, and a reward judges them."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.kl_control import FixedKL, KLPenalty
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.preference import pair_metrics
from lit_rlhf.algorithms.preference_loss import KeepsPairLoss, LossTerm, PreferenceLoss
from lit_rlhf.algorithms.reference_update import ReferenceUpdate
from lit_rlhf.data.batches import NoBatch, PreferenceBatch, RolloutBatch
from lit_rlhf.errors import require, require_types
from lit_rlhf.losses import best_and_worst, dpo_loss
from lit_rlhf.rollout.experience import PlannedRollout


class OnlineDPO(KeepsPairLoss, OnPolicyModule):
    """Online DPO: any loss of pairs, on the best and the worst of `data.group_size` completions by the policy itself.

    Guo et al. 2024, https://arxiv.org/abs/2402.04792

    The reward of the data judges, shaped; pairs of equal reward are left out of the mean, and counted. β is that of
    the loss, and no KL penalty is charged besides.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        beta: strength of the pull towards the reference.
        loss: any of the preference losses in `lit_rlhf.losses`, by its import path, or a list of terms, as of `DPO`;
            its `margin` is the difference of the two rewards.
        advantages: another judge, by its import path: an estimator of advantages, that of the chosen above 0, that
            of the rejected below, as far apart as the two are in reward, and 0 for all others.
        reference_update: let the reference follow the policy, by `alpha` and `every`; null = it stays. With alpha 1
            that is iterative DPO.
        ppo_epochs: passes over the pairs.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "online_dpo"
    kept_of_group = 2
    compares_kept = True

    def __init__(
        self,
        policy: str = "demo",
        beta: float = 0.1,
        loss: list[LossTerm] | Callable[..., Any] = dpo_loss,
        advantages: ChosenFunction | Callable[..., Any] = best_and_worst,
        reference_update: ReferenceUpdate | None = None,
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(OnlineDPO.__init__, locals())
        require(0 < beta < math.inf, "beta", beta, "more than 0 (at 0 every policy has the same loss) and finite")
        super().__init__(
            policy,
            advantages=with_settings(advantages, {}, {}),
            loss=loss,  # type: ignore[arg-type]  # chosen by `chosen_loss` below
            kl=FixedKL(beta),
            kl_penalty=KLPenalty("loss", "k3"),
            whiten_advantages=False,
            loss_average="tokens",
            entropy_coef=0.0,
            target_kl=None,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
        self.beta = beta
        self.reference_update = reference_update
        if reference_update is not None:
            reference_update.require_whole(self.policy, self.frozen_dtype)
            self.moving_reference = reference_update.moving(self.frozen)

    def chosen_loss(self, loss: Any) -> PreferenceLoss:
        """A loss of pairs, or terms of one."""
        return PreferenceLoss(loss)

    def training_step(self, batch: RolloutBatch | NoBatch, batch_idx: int) -> Tensor:
        """One micro-batch of pairs: the preference loss of those whose rewards differ."""
        if isinstance(batch, NoBatch):
            return torch.zeros((), device=self.device, requires_grad=True)
        pairs = self.pairs(batch)
        chosen, rejected = self.sums(batch, self.policy(batch.packed, self.sampling.temperature)[0])
        ref_chosen, ref_rejected = self.sums(batch, batch.ref_logprobs)
        balance = self.balance_term("policy", len(chosen))
        losses = self.loss(chosen, rejected, ref_chosen, ref_rejected, self.beta, **self.loss.inputs_from(pairs))

        counted = pairs.margin > 0
        chosen_rewards, rejected_rewards = self.beta * (chosen - ref_chosen), self.beta * (rejected - ref_rejected)
        self.loss.observe((chosen_rewards + rejected_rewards) / 2)
        columns = (losses, pairs.margin, chosen, rejected, chosen_rewards, rejected_rewards)
        self.log_counted(counted, *(column.detach() for column in columns))
        return ((losses + balance) * counted).sum() / batch.denominator

    def pairs(self, batch: RolloutBatch) -> PreferenceBatch:
        """The micro-batch as one of preferences; its margins are the differences of rewards, 0 of a tie."""
        lengths = batch.packed.response_lengths
        chosen, rejected = (batch.packed.sum_by_sequence(batch.advantages) / lengths).chunk(2)
        return PreferenceBatch(batch.packed, torch.arange(len(chosen)), chosen - rejected, batch.denominator)

    def sums(self, batch: RolloutBatch, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """(M,) log-probs of tokens -> (B,) of chosen and of rejected responses."""
        chosen, rejected = batch.packed.sum_by_sequence(logprobs).chunk(2)
        return chosen, rejected

    def log_counted(self, counted: Tensor, losses: Tensor, margins: Tensor, *sides: Tensor) -> None:
        """Log means over the pairs that are counted; of none, zeros that weigh nothing, since ranks log alike.

        Args:
            counted: (B,) bool.
            losses: (B,).
            margins: (B,) differences of rewards.
            sides: (B,) each: log-probs of chosen and rejected responses, and their implicit rewards.
        """
        count = counted.sum()
        share = counted * (len(counted) / count.clamp(min=1))  # so that a mean over all is one over those
        columns = {"score_margin": margins, **pair_metrics(*sides)}
        named = {"loss": losses} | {f"{self.prefix}/{name}": values for name, values in columns.items()}
        self.log_mean("train", {name: (values * share).mean() for name, values in named.items()}, weight=int(count))

    def step_sizes(self, rollout: PlannedRollout, advantages: Tensor) -> Tensor:
        """Of each optimiser step the pairs whose rewards differ, on this rank."""
        positive = torch.stack([tokens[0] > 0 for tokens in advantages.split(rollout.lengths.tolist())])
        return rollout.step_sums(positive)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As of the loss; then, where it is to, the reference follows the policy."""
        super().optimizer_step(*args, **kwargs)
        if self.reference_update is not None:
            step = self.trainer.global_step + 1  # this one counts afterwards
            self.reference_update.follow(step, self.moving_reference, self.policy)
