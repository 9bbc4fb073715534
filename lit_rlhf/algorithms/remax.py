"""REINFORCE over the score of the most likely response."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.errors import require_types
from lit_rlhf.losses import policy_gradient_loss, remax


class ReMax(OnPolicyModule):
    """ReMax: the policy gradient, over the score of the most likely response to the same prompt.

    Li et al. 2024, https://arxiv.org/abs/2310.10505

    No critic is held; each prompt of a rollout is answered once more, greedily.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        gamma: discount; 1 in RLHF.
        advantages: another estimator of advantages, by its import path; it is given gamma if it names it.
        loss: another policy loss, by its import path.
        whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout of all ranks, too.
        ppo_epochs: passes over a rollout; one, as the policy's own gradient is of its own tokens.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "remax"
    plays_greedy = True

    def __init__(
        self,
        policy: str = "demo",
        gamma: float = 1.0,
        advantages: ChosenFunction | Callable[..., Any] = remax,
        loss: ChosenFunction | Callable[..., Any] = policy_gradient_loss,
        whiten_advantages: bool = False,
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(ReMax.__init__, locals())
        defaults = inspect.signature(ReMax.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {"gamma": gamma}, defaults),
            loss=with_settings(loss, {}, defaults),
            whiten_advantages=whiten_advantages,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
