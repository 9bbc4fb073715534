"""Group relative policy optimisation: PPO whose baseline is the group, and no critic."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.kl_control import KLPenalty
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.algorithms.settings import LossAverage
from lit_rlhf.errors import require_types
from lit_rlhf.losses import grpo, ppo_policy_loss


class GRPO(OnPolicyModule):
    """Group relative policy optimisation: clipped ratios, and advantages over a prompt's completions.

    Shao et al. 2024 (DeepSeekMath), https://arxiv.org/abs/2402.03300

    No critic is held; `data.group_size` completions of each prompt are compared, 2 or more. GSPO and CISPO are
    options of it: see docs/policy_gradients.md.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        clip_range: ε of the clipped policy ratio; null = the loss's own, 0.2 of `ppo_policy_loss`.
        clip_range_high: how far the ratio may rise above 1, where that is not ε (clip-higher of DAPO); null = the
            loss's own.
        advantages: another estimator of advantages, by its import path.
        loss: another policy loss, by its import path; it is given clip_range and clip_range_high if it names them.
        kl_penalty: whether the KL is charged in the reward or in the loss, and its estimator.
        whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout of all ranks, too.
        loss_average: what the policy's loss is a mean over; see `OnPolicyModule`.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "grpo"

    def __init__(
        self,
        policy: str = "demo",
        clip_range: float | None = None,
        clip_range_high: float | None = None,
        advantages: ChosenFunction | Callable[..., Any] = grpo,
        loss: ChosenFunction | Callable[..., Any] = ppo_policy_loss,
        kl_penalty: KLPenalty = KLPenalty("loss", "k3"),
        whiten_advantages: bool = False,
        loss_average: LossAverage = "responses",
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(GRPO.__init__, locals())
        defaults = inspect.signature(GRPO.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {}, defaults),
            loss=with_settings(loss, {"clip_range": clip_range, "clip_range_high": clip_range_high}, defaults),
            kl_penalty=kl_penalty,
            whiten_advantages=whiten_advantages,
            loss_average=loss_average,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
