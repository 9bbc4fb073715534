"""GRPO without what biases it: no division by the standard deviation, nor by a response's length."""

from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.algorithms.settings import LossAverage
from lit_rlhf.losses import dr_grpo


class DrGRPO(GRPO):
    """GRPO done right: advantages over the group's mean, not divided; the loss a sum over tokens.

    Liu et al. 2025, https://arxiv.org/abs/2503.20783

    No critic is held; `data.group_size` completions of each prompt are compared, 2 or more.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        advantages: another estimator of advantages, by its import path.
        loss_average: what the policy's loss is a mean over; see `OnPolicyModule`.
        kwargs: see `GRPO`.
    """

    prefix = "dr_grpo"

    def __init__(
        self,
        policy: str = "demo",
        advantages: ChosenFunction | Callable[..., Any] = dr_grpo,
        loss_average: LossAverage = "max_new_tokens",
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, advantages=advantages, loss_average=loss_average, **kwargs)
