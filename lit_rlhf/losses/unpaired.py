"""Losses of completions by themselves, each of which is desirable or not.

Axes: B completions. Log-probabilities are in nats, summed over the response tokens.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require


@check_shapes
def kto_loss(
    logprobs: Float[Tensor, " B"],
    ref_logprobs: Float[Tensor, " B"],
    desirable: Bool[Tensor, " B"],
    beta: float,
    kl: Float[Tensor, ""] | float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " B"]:
    """Loss of each completion: λ_D (1 - σ(β (h - z₀))) where it is desirable, λ_U (1 - σ(β (z₀ - h))) where it is not.

    Ethayarajh et al. 2024, Eq. 7, https://arxiv.org/abs/2402.01306: λ_y - v(x, y), with the value v of prospect theory.
    h = log π(y|x) - log π_ref(y|x).

    Args:
        logprobs: (B,) log π(y|x), summed over the response tokens.
        ref_logprobs: (B,) log π_ref(y|x); carries no gradient.
        desirable: (B,) the label.
        beta: how soon a gain or a loss counts in full; the paper uses 0.1.
        kl: z₀, () or a number, 0 or more: what gains and losses are counted from, an estimate of KL(π‖π_ref); no
            gradient.
        desirable_weight: λ_D.
        undesirable_weight: λ_U.

    Returns:
        (B,) losses between 0 and the weight; half of it where h = z₀.
    """
    for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
        require(0 < weight < math.inf, name, weight, "more than 0, and finite")
    gain = beta * (logprobs - ref_logprobs - kl)
    return torch.where(desirable, desirable_weight * (-gain).sigmoid(), undesirable_weight * gain.sigmoid())


@check_shapes
def mismatched_kl(logratios: Float[Tensor, ""], count: Float[Tensor, ""] | float) -> Float[Tensor, ""]:
    """z₀ of `kto_loss`: the mean log-ratio of responses behind prompts that are not their own, 0 at least.

    Ethayarajh et al. 2024, section 4.1, https://arxiv.org/abs/2402.01306. It is biased, and cheap: no response is
    sampled. Behind their own prompts the log-ratios are what is learnt, and would move their own reference point.

    Args:
        logratios: () sum of log π(y'|x) - log π_ref(y'|x); carries no gradient.
        count: () of how many.

    Returns:
        () in nats.
    """
    return (logratios / count).clamp(min=0)
