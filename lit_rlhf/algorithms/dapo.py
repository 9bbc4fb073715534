"""GRPO that leaves out groups without a gradient, clips higher upwards, and lets every token weigh the same."""

from typing import Any

from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.kl_control import FixedKL, KLController
from lit_rlhf.algorithms.settings import LossAverage


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling policy optimisation: GRPO by Eqs. 8 to 13 of its paper.

    Yu et al. 2025, https://arxiv.org/abs/2503.14476

    Clip-higher (Eq. 8), dynamic sampling (Eq. 11), the loss a mean over tokens (Eq. 12), and no KL penalty. The soft
    punishment of overlong responses (Eq. 13) is `length_penalty: 1 / n` of `RewardShaping` over the last n tokens, with
    `length_budget: max_new_tokens - n`. No critic is held; `data.group_size` completions of each prompt are compared,
    2 or more.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        clip_range: how far the ratio may fall below 1; null = the loss's own.
        clip_range_high: how far it may rise; null = clip_range.
        kl: β, the coefficient of the KL penalty; null = none, as in the paper. Charged in the reward, it gives groups
            of equal rewards a gradient, too, which dynamic sampling leaves out.
        loss_average: what the policy's loss is a mean over; see `OnPolicyModule`.
        dynamic_sampling: rounds, at most, in which other groups are dealt in place of those with equal rewards.
        num_minibatches: optimiser steps per pass.
        kwargs: see `GRPO`.
    """

    prefix = "dapo"

    def __init__(
        self,
        policy: str = "demo",
        clip_range: float | None = 0.2,
        clip_range_high: float | None = 0.28,
        kl: KLController | None = None,
        loss_average: LossAverage = "tokens",
        dynamic_sampling: int = 10,
        num_minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            policy,
            clip_range=clip_range,
            clip_range_high=clip_range_high,
            kl=FixedKL(0.0) if kl is None else kl,
            loss_average=loss_average,
            dynamic_sampling=dynamic_sampling,
            num_minibatches=num_minibatches,
            **kwargs,
        )
