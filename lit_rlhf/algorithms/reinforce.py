"""The policy gradient itself, over a baseline that is not learnt."""

import inspect
from collections.abc import Callable
from typing import Any, Literal

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.errors import require_types
from lit_rlhf.losses import policy_gradient_loss, reinforce


class REINFORCE(OnPolicyModule):
    """REINFORCE: the policy gradient of the reward to go, over its running mean.

    Williams 1992, https://doi.org/10.1007/BF00992696

    No critic is held. With one, as a baseline: `PPO` with `advantages: {function: lit_rlhf.losses.reinforce, options:
    {baseline: critic}}` and `loss: lit_rlhf.losses.policy_gradient_loss`.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        gamma: discount; 1 in RLHF.
        baseline: "running_mean" = the mean return of all responses of the run so far; "none".
        advantages: another estimator of advantages, by its import path; it is given gamma and baseline if it names
            them.
        loss: another policy loss, by its import path.
        whiten_advantages: bring advantages to mean 0 and variance 1 over the rollout of all ranks, too.
        ppo_epochs: passes over a rollout; one, as the policy's own gradient is of its own tokens.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "reinforce"

    def __init__(
        self,
        policy: str = "demo",
        gamma: float = 1.0,
        baseline: Literal["none", "running_mean"] = "running_mean",
        advantages: ChosenFunction | Callable[..., Any] = reinforce,
        loss: ChosenFunction | Callable[..., Any] = policy_gradient_loss,
        whiten_advantages: bool = False,
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(REINFORCE.__init__, locals())
        defaults = inspect.signature(REINFORCE.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {"gamma": gamma, "baseline": baseline}, defaults),
            loss=with_settings(loss, {}, defaults),
            whiten_advantages=whiten_advantages,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
