"""KL(π‖π_ref) from samples.

The estimators are elementwise in the log-probabilities (nats) of tokens that were sampled from π; their mean over
samples estimates the divergence. Any shape, the same for all tensors: (M,) in packed batches.

Which to use where:
- In the reward (`-kl_coef * kl`): k1. The policy gradient of the sum of k1 is the exact gradient of the sequence KL.
- In the loss: the *gradient* of the estimate matters, not its mean. E_π[∇k1] = 0, E_π[∇k2] = ∇KL(π‖π_ref) and
  E_π[∇k3] = ∇KL(π_ref‖π): k2 is the right one; `with_k2_gradient` keeps the value of another.
  Of each token it is blind to what the token leads to; `sequence_k2` sees whole responses.
- To report: k3, unbiased like k1, never negative, and of far lower variance while π is near π_ref (far off, of more).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes

# exp(20) = 4.9e8: far from overflow in float32 and far from any ratio that a sane update makes.
MAX_LOGRATIO = 20.0


@check_shapes
def clamped_logratio(
    logprobs: Float[Tensor, "*shape"], other_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Log-ratio log π - log π_other, held within ±20 so that `exp` of it and its gradient are finite.

    Args:
        logprobs: log π of the tokens.
        other_logprobs: log π_other of them.

    Returns:
        Log-ratios of the same shape; past the clamp the gradient is 0.
    """
    return (logprobs - other_logprobs).clamp(-MAX_LOGRATIO, MAX_LOGRATIO)


@check_shapes
def k1(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Unbiased, high variance, may be negative: k1 = log π - log π_ref.

    Schulman 2020, http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: log π of tokens sampled from π.
        ref_logprobs: log π_ref of them.

    Returns:
        Estimates of the same shape. No `exp`, so no clamp.
    """
    return logprobs - ref_logprobs


@check_shapes
def k2(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Biased in value, unbiased in gradient, never negative: k2 = ½ (log π - log π_ref)².

    Schulman 2020, http://joschu.net/blog/kl-approx.html

    Args:
        logprobs: log π of tokens sampled from π.
        ref_logprobs: log π_ref of them.

    Returns:
        Estimates of the same shape. No `exp`, so no clamp.
    """
    return 0.5 * (logprobs - ref_logprobs).square()


@check_shapes
def k3(logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Unbiased, never negative, low variance near π_ref: k3 = r - 1 - log r with r = π_ref/π.

    Schulman 2020, http://joschu.net/blog/kl-approx.html. log r is clamped from above only, where `exp` would overflow;
    below, exp(log r) goes to 0 by itself and the linear part keeps its gradient.

    Args:
        logprobs: log π of tokens sampled from π.
        ref_logprobs: log π_ref of them.

    Returns:
        Estimates of the same shape.
    """
    log_r = (ref_logprobs - logprobs).clamp(max=MAX_LOGRATIO)
    return torch.expm1(log_r) - log_r


@check_shapes
def with_k2_gradient(
    estimate: Float[Tensor, "*shape"], logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """The value of `estimate` with the gradient of k2: on tokens of π, an unbiased gradient of KL(π‖π_ref).

    The gradient is that of each token's KL given its prefix; what a token does to later states is seen only by KL in
    the reward. Tang & Munos 2025, https://arxiv.org/abs/2506.09477, derive which estimators differentiate to what.

    Args:
        estimate: k1, k2 or k3 of the same tokens, for its value.
        logprobs: log π of tokens sampled from the present π.
        ref_logprobs: log π_ref of them.

    Returns:
        Estimates of the same shape.
    """
    surrogate = k2(logprobs, ref_logprobs)
    return estimate.detach() + surrogate - surrogate.detach()


@check_shapes
def sequence_sums(values: Float[Tensor, "*shape"], sequence_ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """For each token the sum over its response.

    Args:
        values: of tokens.
        sequence_ids: the response of each, below their number.

    Returns:
        The same shape.
    """
    return torch.zeros_like(values).flatten().index_add(0, sequence_ids.flatten(), values.flatten())[sequence_ids]


@check_shapes
def sequence_k2(
    logprobs: Float[Tensor, "*shape"], ref_logprobs: Float[Tensor, "*shape"], sequence_ids: Int[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """k2 of whole responses, ½ (log π(y)/π_ref(y))², in equal shares on their tokens.

    Summed over the tokens of responses of π, its gradient is that of the whole responses' KL: what a token does to the
    KL of later ones counts, as with k1 in the reward. Tang & Munos 2025, https://arxiv.org/abs/2506.09477.

    Args:
        logprobs: log π of tokens of whole responses, sampled from π.
        ref_logprobs: log π_ref of them.
        sequence_ids: the response of each.

    Returns:
        The same shape.
    """
    lengths = sequence_sums(torch.ones_like(logprobs), sequence_ids)
    return 0.5 * sequence_sums(logprobs - ref_logprobs, sequence_ids).square() / lengths


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"k1": k1, "k2": k2, "k3": k3}
