"""A method on policy as the oracle judges it: the parts of `OnPolicyModule`'s loss without a model around them."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.algorithms.kl_control import KLPenalty
from lit_rlhf.algorithms.settings import LossAverage
from lit_rlhf.errors import require_types
from lit_rlhf.losses import Advantages, PolicyLoss, PolicyTokens, ScoredRollout
from lit_rlhf.losses.advantages import Moments, token_rewards, whiten
from lit_rlhf.oracle.groups import Groups


@dataclass(frozen=True)
class OnPolicyMethod:
    """An estimator of advantages, a policy loss and a KL penalty, as in a rollout and a minibatch without end.

    What a rollout of finite size estimates is exact: the moments that whiten, the mean length of a response, the mean
    return so far; a critic knows the values, and greedy responses are those of the policy that plays.

    Args:
        advantages: a function of a `ScoredRollout`, as of `lit_rlhf.losses`.
        loss: a function of `PolicyTokens`.
        kl_penalty: where the KL is charged, and by which estimator.
        whiten_advantages: mean 0 and variance 1 over all tokens.
        loss_average: "tokens" and "max_new_tokens" weigh all tokens alike; "responses" by mean length over length. The
            loss is a sum over tokens: what a mean divides all of them by is the learning rate's.
    """

    advantages: Callable[[ScoredRollout], Advantages]
    loss: Callable[[PolicyTokens], PolicyLoss]
    kl_penalty: KLPenalty = KLPenalty()
    whiten_advantages: bool = False
    loss_average: LossAverage = "tokens"

    def __post_init__(self) -> None:
        """Refuse what is no such method."""
        require_types(OnPolicyMethod, vars(self))

    @classmethod
    def of(cls, algorithm: type, **changes: Any) -> "OnPolicyMethod":
        """The defaults of one of the algorithms, such as `lit_rlhf.GRPO`, but for `changes`."""
        defaults: dict[str, Any] = {}
        for kind in reversed(algorithm.__mro__):
            if "__init__" in vars(kind):
                parameters = inspect.signature(vars(kind)["__init__"]).parameters.values()
                defaults |= {p.name: p.default for p in parameters if p.default is not p.empty}
        names = [name for name in cls.__dataclass_fields__ if name in defaults]
        return cls(**{name: defaults[name] for name in names} | changes)

    def slopes(self, groups: Groups, kl_coef: float) -> Tensor:
        """(B, T) ∂ loss / ∂ log π of each token: of each group's loss, the mean of its responses'.

        Args:
            groups: all that there are.
            kl_coef: β.
        """
        groups = groups.with_gradient()
        losses = self.token_losses(groups, self.credited(groups, kl_coef), kl_coef)
        return torch.autograd.grad(losses.sum() / groups.group_size, groups.logprobs)[0]

    def credited(self, groups: Groups, kl_coef: float) -> Tensor:
        """(B, T) advantages, whitened where they are to be."""
        mask, weights = groups.response_mask, groups.weights[:, None]
        in_reward = self.kl_penalty.place == "reward"
        penalty = self.kl_penalty.estimate(groups.old_logprobs, groups.ref_logprobs)
        rewards = token_rewards(groups.scores, penalty, kl_coef if in_reward else 0.0, mask)
        rollout = ScoredRollout(
            rewards,
            groups.values if in_reward else groups.score_values,
            mask,
            groups.scores,
            group_index=groups.group_index,
            running_mean=(weights * rewards).sum(),
            greedy_scores=groups.greedy_scores,
        )
        advantages = self.advantages(rollout).advantages
        if self.whiten_advantages:
            sums = [
                (weights * mask * power).sum() for power in (advantages, advantages.square(), torch.ones_like(rewards))
            ]
            advantages = whiten(advantages, mask, Moments(*sums))
        return advantages

    def token_losses(self, groups: Groups, advantages: Tensor, kl_coef: float) -> Tensor:
        """(M,) losses of the response tokens, weighed as their mean does."""
        mask, lengths = groups.response_mask, groups.response_mask.sum(1)
        ids = torch.arange(len(mask))[:, None].expand_as(mask)[mask]
        logprobs, old, ref = (rows[mask] for rows in (groups.logprobs, groups.old_logprobs, groups.ref_logprobs))
        losses = self.loss(PolicyTokens(logprobs, old, advantages[mask], ids)).losses
        if self.kl_penalty.place == "loss":
            losses = losses + kl_coef * self.kl_penalty.loss(logprobs, old, ref, ids)
        if self.loss_average == "responses":
            losses = losses * ((groups.weights * lengths).sum() / lengths)[ids]
        return losses
