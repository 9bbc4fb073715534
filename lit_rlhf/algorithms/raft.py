"""Best-of-N fine-tuning: imitate the best of several completions."""

import inspect
from collections.abc import Callable
from typing import Any

from lit_rlhf.algorithms.chosen import ChosenFunction, with_settings
from lit_rlhf.algorithms.kl_control import FixedKL, KLController
from lit_rlhf.algorithms.on_policy import OnPolicyModule
from lit_rlhf.errors import require_types
from lit_rlhf.losses import best_of_group, policy_gradient_loss


class RAFT(OnPolicyModule):
    """Reward-ranked fine-tuning, or rejection sampling: SFT on the best of a prompt's completions.

    Dong et al. 2023, Algorithm 1, https://arxiv.org/abs/2304.06767

    N = `data.group_size` completions of each prompt are compared, 2 or more; the best is learnt from alone. An
    iteration moves towards the best of N, which earns more and is at most log N - (N - 1)/N nats from what played.

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model; also the reference.
        advantages: another estimator of advantages, by its import path; the response of the largest is learnt from.
        loss: another policy loss, by its import path; with A = 1, `policy_gradient_loss` is that of SFT.
        kl: β of the KL penalty in the reward, by which completions are compared, too; null = none.
        ppo_epochs: passes over the best completions.
        num_minibatches: optimiser steps per pass.
        kwargs: see `OnPolicyModule`.
    """

    prefix = "raft"
    kept_of_group = 1

    def __init__(
        self,
        policy: str = "demo",
        advantages: ChosenFunction | Callable[..., Any] = best_of_group,
        loss: ChosenFunction | Callable[..., Any] = policy_gradient_loss,
        kl: KLController | None = None,
        ppo_epochs: int = 1,
        num_minibatches: int = 1,
        **kwargs: Any,
    ) -> None:
        require_types(RAFT.__init__, locals())
        defaults = inspect.signature(RAFT.__init__).parameters
        super().__init__(
            policy,
            advantages=with_settings(advantages, {}, defaults),
            loss=with_settings(loss, {}, defaults),
            kl=FixedKL(0.0) if kl is None else kl,
            whiten_advantages=False,
            ppo_epochs=ppo_epochs,
            num_minibatches=num_minibatches,
            **kwargs,
        )
