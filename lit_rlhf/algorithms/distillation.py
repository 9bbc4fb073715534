"""Distillation: learn the next-token distributions of a teacher, on the data's responses or on the student's own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.kl_control import FixedKL, KLPenalty
from lit_rlhf.algorithms.module import AlignmentModule
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import DistillationSettings, LossAverage
from lit_rlhf.algorithms.teacher import Beside, chosen_divergence, frozen_model
from lit_rlhf.data.batches import NoBatch, RolloutBatch, SFTBatch
from lit_rlhf.engine.packing import PackedBatch
from lit_rlhf.errors import named_by
from lit_rlhf.losses import forward_kl, reinforce, reverse_kl
from lit_rlhf.models.adapters import LoRA
from lit_rlhf.models.loading import load_policy_with_tokenizer
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.roles import OwnModel
from lit_rlhf.rollout.play import GenerationSettings


class Distillation(AlignmentModule):
    """Distillation on demonstrations: minimise Σ_t D(teacher(·|x, y_<t), π(·|x, y_<t)) over their response tokens.

    Hinton et al. 2015, https://arxiv.org/abs/1503.02531; Agarwal et al. 2024 (GKD), Eq. 3 with λ = 0,
    https://arxiv.org/abs/2306.13649

    Args:
        policy: folder or hub name of the student, a causal LM.
        teacher: folder or hub name of the model to learn from, of the same vocabulary; it never learns.
        divergence: D, a function of the log-probs of teacher and student by its import path: `forward_kl`,
            `reverse_kl`, `generalized_jensen_shannon` of `lit_rlhf.losses`, or one of yours.
        temperature: divides the logits of both.
        lora: train an adapter on frozen weights; null = all weights, or the adapter in policy's folder.
        merge_start: fold the adapter in policy's folder into its base before anything else.
        trust_remote_code: run model code that comes with the weights.
        generation: how `predict` and the sample tables write completions.
        kwargs: the optimiser's settings, see `AlignmentModule`; `frozen_dtype` is the teacher's, too.
    """

    learns_from = "sft"

    def __init__(
        self,
        policy: str,
        teacher: str,
        divergence: ChosenFunction | Callable[..., Any] = forward_kl,
        temperature: float = 1.0,
        lora: LoRA | None = None,
        merge_start: bool = False,
        trust_remote_code: bool = False,
        generation: GenerationSettings = GenerationSettings(),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = DistillationSettings(teacher, temperature)
        with named_by("model.divergence"):
            self.divergence = chosen_divergence(with_settings(divergence, {}, {}))
        self.policy, self.tokenizer = load_policy_with_tokenizer(
            policy, False, trust_remote_code, lora, merge_start, self.frozen_dtype
        )
        beside = Beside(self.policy, self.tokenizer, self.frozen, None, self.frozen_dtype, trust_remote_code)
        self.teacher = frozen_model(teacher, "teacher", beside)
        self.generation = generation

    def views(self) -> dict[str, Any]:
        """Policy and teacher."""
        return {**super().views(), "teacher": self.teacher}

    def read_along(self) -> list[Policy]:
        """The teacher."""
        return [self.teacher.network]

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        """One micro-batch: the divergence of its response tokens."""
        losses = self.token_losses(batch, "train")
        return (losses + self.balance_term("policy", len(losses))).sum() / batch.denominator

    @torch.no_grad()
    def evaluate(self, batch: SFTBatch, stage: str) -> None:
        """Log the divergence, a mean over all response tokens."""
        self.token_losses(batch, stage)

    def token_losses(self, batch: SFTBatch, stage: str) -> Tensor:
        """(M,) divergences, logged."""
        losses = divergence_from(self.teacher, self.policy, batch.packed, self.divergence, self.settings.temperature)
        self.log_mean(stage, {"loss": losses.detach().mean()}, weight=len(losses))
        return losses


class OnPolicyDistillation(OnPolicyModule):
    """Distillation on the student's own responses: Σ_t D(teacher(·|x, y_<t), π(·|x, y_<t)) with y sampled from π.

    Agarwal et al. 2024 (GKD), Eq. 3 with λ = 1, https://arxiv.org/abs/2306.13649. As there, no gradient flows through
    the sampling. The reward of the data is logged and not learnt from.

    Args:
        policy: folder or hub name of the student, a causal LM.
        teacher: folder or hub name of the model to learn from, of the same vocabulary; it never learns.
        divergence: D, as of `Distillation`.
        loss_average: what the loss is a mean over; see `OnPolicyModule`.
        ppo_epochs: passes over the responses of an iteration.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`; `frozen_dtype` is the teacher's, too.
    """

    prefix = "distillation"

    def __init__(
        self,
        policy: str,
        teacher: str,
        divergence: ChosenFunction | Callable[..., Any] = reverse_kl,
        loss_average: LossAverage = "tokens",
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        DistillationSettings(teacher)
        super().__init__(
            policy,
            advantages=ChosenFunction(reinforce, {"baseline": "none"}),  # of nothing: what is earned is logged
            loss=with_settings(divergence, {}, {}),
            kl=FixedKL(0.0),
            kl_penalty=KLPenalty(),
            shaping=None,
            whiten_advantages=False,
            loss_average=loss_average,
            entropy_coef=0.0,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            target_kl=None,
            reference=teacher,
            **kwargs,
        )

    def other_reference(self, name: str, beside: Beside) -> OwnModel:
        """The teacher, a model of its own: all of its logits are read."""
        return frozen_model(name, "teacher", beside)

    def chosen_loss(self, loss: ChosenFunction) -> Any:
        """A divergence."""
        return chosen_divergence(loss)

    @property
    def teacher(self) -> OwnModel:
        """In the place of the reference, which is what `rollout/kl` is to."""
        assert isinstance(self.reference, OwnModel)
        return self.reference

    def views(self) -> dict[str, Any]:
        """Policy and teacher."""
        return {"policy": super().views()["policy"], "teacher": self.teacher}

    def read_along(self) -> list[Policy]:
        """The teacher."""
        return [self.teacher.network]

    def training_step(self, batch: RolloutBatch | NoBatch, batch_idx: int) -> Tensor:
        """One micro-batch of the current rollout: the divergence of its response tokens."""
        if isinstance(batch, NoBatch):
            return torch.zeros((), device=self.device, requires_grad=True)
        temperature, weights = self.sampling.temperature, batch.weights
        losses = divergence_from(self.teacher, self.policy, batch.packed, self.loss, temperature, weights)
        self.log_mean("train", {"loss": losses.detach().mean()}, weight=len(losses))
        return (losses + self.balance_term("policy", len(losses))).sum() / batch.denominator


def divergence_from(
    teacher: OwnModel,
    policy: Any,
    packed: PackedBatch,
    divergence: Any,
    temperature: float,
    weights: Tensor | None = None,
) -> Tensor:
    """(M,) divergences of the policy from its teacher, see `Policy.divergence`."""
    with teacher.at_hand():
        losses: Tensor = policy.divergence(packed, teacher.network, divergence, temperature, weights)
    return losses
