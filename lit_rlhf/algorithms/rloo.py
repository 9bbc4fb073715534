"""REINFORCE over the mean return of the other completions of a prompt."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.errors import require_types
from lit_rlhf.losses import policy_gradient_loss, rloo


class RLOO(OnPolicyModule):
    """REINFORCE leave-one-out: the policy gradient, over the mean return of a prompt's other completions.

    Ahmadian et al. 2024, https://arxiv.org/abs/2402.14740

    No critic is held; `data.group_size` completions of each prompt are compared, 2 or more.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        advantages: another estimator of advantages, by its import path.
        loss: another policy loss, by its import path.
        whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout of all ranks, too.
        ppo_epochs: passes over a rollout; one, as the policy's own gradient is of its own tokens.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "rloo"

    def __init__(
        self,
        policy: str = "demo",
        advantages: ChosenFunction | Callable[..., Any] = rloo,
        loss: ChosenFunction | Callable[..., Any] = policy_gradient_loss,
        whiten_advantages: bool = False,
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(RLOO.__init__, locals())
        defaults = inspect.signature(RLOO.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {}, defaults),
            loss=with_settings(loss, {}, defaults),
            whiten_advantages=whiten_advantages,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
