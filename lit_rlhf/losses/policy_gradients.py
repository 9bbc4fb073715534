"""PPO's losses of each response token. Any shape, the same for all tensors: (M,) in packed batches."""

import torch
from torch import Tensor

from lit_rlhf.losses.kl import clamped_logratio


def ppo_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Pessimistic clipped surrogate of each token: -min(ρ A, clip(ρ, 1 ± clip_range) A) with ρ = π/π_old.

    Schulman et al. 2017, Eq. 7, https://arxiv.org/abs/1707.06347. The log-ratio is clamped before `exp`, so one token
    whose probability collapsed can neither overflow nor turn the gradient into NaN; past the clamp it has no gradient.

    Args:
        logprobs: log π of the taken tokens, now.
        old_logprobs: log π_old of them, at rollout, from the same forward path; carries no gradient.
        advantages: of the tokens, whitened over the rollout; carries no gradient.
        clip_range: how far the ratio may move from 1 before it stops paying; the paper uses 0.2.

    Returns:
        Losses of the same shape; -advantages where policy and old policy agree.
    """
    ratio = torch.exp(clamped_logratio(logprobs, old_logprobs))
    clipped_ratio = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def clip_fraction(logprobs: Tensor, old_logprobs: Tensor, clip_range: float) -> Tensor:
    """1 for each token whose ratio left 1 ± clip_range, else 0: a diagnostic, without gradient.

    Args:
        logprobs: log π of the taken tokens, now.
        old_logprobs: log π_old of them, at rollout.
        clip_range: as in `ppo_policy_loss`.

    Returns:
        0 or 1 per token, in the dtype of `logprobs`; the mean over tokens is the fraction.
    """
    ratio = torch.exp(clamped_logratio(logprobs, old_logprobs))
    return ((ratio - 1).abs() > clip_range).to(logprobs.dtype)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float | None) -> Tensor:
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
