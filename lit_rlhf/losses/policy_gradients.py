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
from lit_rlhf.losses.kl import clamped_logratio, sequence_sums


class PolicyTokens(NamedTuple):
    """What a policy loss is computed from: the sampled tokens of a minibatch, and what they turned out to be worth."""

    logprobs: Float[Tensor, "*shape"]  # log π of the tokens, now
    old_logprobs: Float[Tensor, "*shape"]  # log π_old, at rollout, from the same forward path; carries no gradient
    advantages: Float[Tensor, "*shape"]  # as the method whitens them, or not; carries no gradient
    sequence_ids: Int[Tensor, "*shape"] | None = None  # the response of a token; for losses of whole responses


class PolicyLoss(NamedTuple):
    """What a policy loss gives: a loss per token, and by name what to log of it, a value per token each."""

    losses: Float[Tensor, "*shape"]
    metrics: dict[str, Float[Tensor, "*shape"]]


@check_shapes
def policy_gradient_loss(tokens: PolicyTokens) -> PolicyLoss:
    """The policy gradient itself: -A log π.

    Williams 1992, https://doi.org/10.1007/BF00992696. It is that of π on tokens of π: with further steps on one rollout
    it is that of a policy that has gone, which `ratio` shows.

    Args:
        tokens: of a minibatch.

    Returns:
        Losses of the same shape; the metric `ratio`.
    """
    ratio = torch.exp(clamped_logratio(tokens.logprobs, tokens.old_logprobs))
    return PolicyLoss(-tokens.advantages * tokens.logprobs, {"ratio": ratio.detach()})


@check_shapes
def ppo_policy_loss(tokens: PolicyTokens, clip_range: float = 0.2, clip_range_high: float | None = None) -> PolicyLoss:
    """Pessimistic clipped surrogate of each token: -min(ρ A, clip(ρ, 1 ± clip_range) A) with ρ = π/π_old.

    Schulman et al. 2017, Eq. 7, https://arxiv.org/abs/1707.06347. The log-ratio is clamped before `exp`, so one token
    whose probability collapsed can neither overflow nor turn the gradient into NaN; past the clamp it has no gradient.

    Args:
        tokens: of a minibatch.
        clip_range: how far the ratio may move from 1 before it stops paying; the paper uses 0.2.
        clip_range_high: the same upwards, where it is another: clip-higher of Yu et al. 2025 (DAPO), section 3.1,
            https://arxiv.org/abs/2503.14476, who use 0.28 beside 0.2; None = clip_range.

    Returns:
        Losses of the same shape, -advantages where policy and old policy agree; the metrics `ratio`, and
        `clip_fraction`, 1 where the ratio left its range and 0 elsewhere.
    """
    ratio = torch.exp(clamped_logratio(tokens.logprobs, tokens.old_logprobs))
    return _clipped_surrogate(ratio, tokens.advantages, clip_range, clip_range_high)


@check_shapes
def gspo_policy_loss(
    tokens: PolicyTokens, clip_range: float = 3e-4, clip_range_high: float | None = 4e-4
) -> PolicyLoss:
    """Clipped surrogate by the ratio of whole responses: ρ = (π(y)/π_old(y))^(1/|y|) for each of their tokens.

    Zheng et al. 2025 (GSPO), section 4.1, https://arxiv.org/abs/2507.18071; per token as their GSPO-token, section 4.3:
    the value of the response's ratio, and the gradient of the token's own log-prob. With equal advantages and the mean
    over each response's tokens (`loss_average: responses`) that is GSPO.

    Args:
        tokens: of a minibatch of whole responses, with sequence_ids.
        clip_range: how far the ratio may fall below 1; the paper uses 3e-4.
        clip_range_high: how far it may rise; the paper uses 4e-4; None = clip_range.

    Returns:
        Losses of the same shape; the metrics `ratio` and `clip_fraction`.

    Raises:
        ValueError: the tokens do not say which response they are of.
    """
    if tokens.sequence_ids is None:
        raise ValueError("gspo_policy_loss needs sequence_ids, the response of each token")
    logratio = (tokens.logprobs - tokens.old_logprobs).detach()
    lengths = sequence_sums(torch.ones_like(logratio), tokens.sequence_ids)
    mean = sequence_sums(logratio, tokens.sequence_ids) / lengths
    ratio = torch.exp(clamped_logratio(mean + tokens.logprobs, tokens.logprobs.detach()))
    return _clipped_surrogate(ratio, tokens.advantages, clip_range, clip_range_high)


@check_shapes
def cispo_policy_loss(tokens: PolicyTokens, clip_range_high: float = 4.0) -> PolicyLoss:
    """The policy gradient, weighed by a ratio that is cut from above: -min(ρ, 1 + clip_range_high) A log π.

    MiniMax 2025 (CISPO), Eqs. 4 and 5, https://arxiv.org/abs/2506.13585: the weight carries no gradient, so that no
    token is left out; like theirs it is not cut from below.

    Args:
        tokens: of a minibatch.
        clip_range_high: by how much a weight may exceed 1; 4 is the bound of 5 that Khatri et al. 2025 found best,
            https://arxiv.org/abs/2510.13786.

    Returns:
        Losses of the same shape; the metrics `ratio`, and `clip_fraction`, 1 where the weight is cut and 0 elsewhere.
    """
    require(0 <= clip_range_high < math.inf, "clip_range_high", clip_range_high, "0 or more and finite")
    ratio = torch.exp(clamped_logratio(tokens.logprobs, tokens.old_logprobs)).detach()
    losses = -ratio.clamp(max=1 + clip_range_high) * tokens.advantages * tokens.logprobs
    return PolicyLoss(losses, {"ratio": ratio, "clip_fraction": (ratio > 1 + clip_range_high).to(ratio.dtype)})


def _clipped_surrogate(
    ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], low: float, high: float | None
) -> PolicyLoss:
    """-min(ρ A, clip(ρ, 1 - low, 1 + high) A), and what to log of it; high = None is low."""
    require(0 < low < math.inf, "clip_range", low, "more than 0 and finite")
    high = low if high is None else high
    require(0 < high < math.inf, "clip_range_high", high, "more than 0 and finite, or null for clip_range")
    clipped_ratio = ratio.clamp(1 - low, 1 + high)
    losses = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = ((ratio - 1 > high) | (1 - ratio > low)).to(ratio.dtype)
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
