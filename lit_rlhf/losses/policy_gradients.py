"""Policy gradient losses, and the critic's, of each response token.

Any shape, the same for all tensors: (M,) in packed batches.

A policy loss is a function of `PolicyTokens`, and of options of its own, that gives a `PolicyLoss`.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require
from lit_rlhf.losses.kl import clamped_logratio


class PolicyTokens(NamedTuple):
    """What a policy loss is computed from: the sampled tokens of a minibatch, and what they turned out to be worth."""

    logprobs: Float[Tensor, "*shape"]  # log π of the tokens, now
    old_logprobs: Float[Tensor, "*shape"]  # log π_old, at rollout, from the same forward path; carries no gradient
    advantages: Float[Tensor, "*shape"]  # whitened over the rollout; carries no gradient
    sequence_ids: Int[Tensor, "*shape"] | None = None  # the response of a token; for losses of whole responses


class PolicyLoss(NamedTuple):
    """What a policy loss gives: a loss per token, and by name what to log of it, a value per token each."""

    losses: Float[Tensor, "*shape"]
    metrics: dict[str, Float[Tensor, "*shape"]]


@check_shapes
def ppo_policy_loss(tokens: PolicyTokens, clip_range: float = 0.2) -> PolicyLoss:
    """Pessimistic clipped surrogate of each token: -min(ρ A, clip(ρ, 1 ± clip_range) A) with ρ = π/π_old.

    Schulman et al. 2017, Eq. 7, https://arxiv.org/abs/1707.06347. The log-ratio is clamped before `exp`, so one token
    whose probability collapsed can neither overflow nor turn the gradient into NaN; past the clamp it has no gradient.

    Args:
        tokens: of a minibatch.
        clip_range: how far the ratio may move from 1 before it stops paying; the paper uses 0.2.

    Returns:
        Losses of the same shape, -advantages where policy and old policy agree; the metrics `ratio`, and
        `clip_fraction`, 1 where the ratio left 1 ± clip_range and 0 elsewhere.
    """
    require(0 < clip_range < math.inf, "clip_range", clip_range, "more than 0 and finite")
    ratio = torch.exp(clamped_logratio(tokens.logprobs, tokens.old_logprobs))
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    losses = -torch.minimum(ratio * tokens.advantages, clipped_ratio * tokens.advantages)
    clipped = ((ratio - 1).abs() > clip_range).to(ratio.dtype)
    return PolicyLoss(losses, {"ratio": ratio.detach(), "clip_fraction": clipped})


@check_shapes
def value_loss(
    values: Float[Tensor, "*shape"],
    old_values: Float[Tensor, "*shape"],
    returns: Float[Tensor, "*shape"],
    clip_range: float | None,
) -> Float[Tensor, "*shape"]:
    """Clipped value loss of each token: ½ max((V - R)², (clip(V, V_old ± clip_range) - R)²).

    Schulman et al. 2016's regression with the clipping of OpenAI's PPO, as described by Huang et al. 2022, detail 9,
    https://iclr-blog-track.github.io/2022/03/25/ppo-implementation-details/.

    Args:
        values: V of the tokens, now.
        old_values: V_old at rollout; carries no gradient.
        returns: R, the target; carries no gradient.
        clip_range: how far V may move from V_old before moving further stops paying; None for the plain ½ (V - R)².

    Returns:
        Losses of the same shape; 0 where V = V_old = R.
    """
    squares = (values - returns).square()
    if clip_range is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
        squares = torch.maximum(squares, (clipped_values - returns).square())
    return 0.5 * squares
