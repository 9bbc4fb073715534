"""REINFORCE with what helps PPO: clipped ratios, and advantages whitened over the whole rollout."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.errors import require_types
from lit_rlhf.losses import ppo_policy_loss, reinforce_plus_plus


class REINFORCEPlusPlus(OnPolicyModule):
    """REINFORCE++: reward to go, whitened over the whole rollout, and clipped ratios.

    Hu et al. 2025, https://arxiv.org/abs/2501.03262

    No critic is held, and one completion of a prompt will do.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        gamma: discount; 1 in RLHF.
        group_baseline: subtract the mean return of a prompt's `data.group_size` completions before: the paper's
            REINFORCE++-baseline.
        clip_range: ε of the clipped policy ratio; null = the loss's own, 0.2 of `ppo_policy_loss`.
        clip_range_high: how far the ratio may rise above 1, where that is not ε (clip-higher of DAPO); null = the
            loss's own.
        advantages: another estimator of advantages, by its import path; it is given gamma and group_baseline if it
            names them.
        loss: another policy loss, by its import path; it is given clip_range and clip_range_high if it names them.
        ppo_epochs: passes over a rollout.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "reinforce_plus_plus"

    def __init__(
        self,
        policy: str = "demo",
        gamma: float = 1.0,
        group_baseline: bool = False,
        clip_range: float | None = None,
        clip_range_high: float | None = None,
        advantages: ChosenFunction | Callable[..., Any] = reinforce_plus_plus,
        loss: ChosenFunction | Callable[..., Any] = ppo_policy_loss,
        ppo_epochs: int = 1,
        num_minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        require_types(REINFORCEPlusPlus.__init__, locals())
        defaults = inspect.signature(REINFORCEPlusPlus.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {"gamma": gamma, "group_baseline": group_baseline}, defaults),
            loss=with_settings(loss, {"clip_range": clip_range, "clip_range_high": clip_range_high}, defaults),
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
