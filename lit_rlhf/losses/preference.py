"""DPO and its family: losses of preference pairs from summed log-probabilities.

All share the arguments of `dpo_loss`. In the docstrings, with y_w chosen and y_l rejected,
    h_w = log π(y_w|x) - log π_ref(y_w|x) and h_l likewise: the log-ratios,
    z = β (h_w - h_l): the margin of the implicit rewards β h.
Without a reference (a uniform one), pass zeros for both reference log-probabilities.

Axes: B pairs. Log-probabilities are in nats, summed over the response tokens.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.losses.kl import MAX_LOGRATIO


@check_shapes
def dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """Loss of each preference pair: -log σ(β (chosen log-ratio - rejected log-ratio)).

    Rafailov et al. 2023, Eq. 7, https://arxiv.org/abs/2305.18290

    Args:
        chosen_logprobs: (B,) log π(y_w|x), summed over the response tokens.
        rejected_logprobs: (B,) log π(y_l|x), likewise.
        ref_chosen_logprobs: (B,) log π_ref(y_w|x); carries no gradient.
        ref_rejected_logprobs: (B,) log π_ref(y_l|x); carries no gradient.
        beta: strength of the pull towards the reference; the paper uses 0.1 to 0.5.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    chosen_logratio = chosen_logprobs - ref_chosen_logprobs
    rejected_logratio = rejected_logprobs - ref_rejected_logprobs
    return -F.logsigmoid(beta * (chosen_logratio - rejected_logratio))


@check_shapes
def conservative_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " B"]:
    """cDPO, for labels that are wrong with probability ε: -(1 - ε) log σ(z) - ε log σ(-z).

    Mitchell 2023, Eq. 3, https://ericmitchell.ai/cdpo.pdf

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        label_smoothing: ε in [0, 0.5); 0 is `dpo_loss`.

    Returns:
        (B,) losses; least at z = logit(1 - ε), where DPO's would fall without end.
    """
    _check_label_smoothing(label_smoothing)
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


@check_shapes
def robust_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    label_smoothing: float,
) -> Float[Tensor, " B"]:
    """rDPO, unbiased under labels flipped with probability ε: (-(1 - ε) log σ(z) + ε log σ(-z)) / (1 - 2ε).

    Chowdhury et al. 2024, section 3.1, https://arxiv.org/abs/2403.00409. Averaged over the flips it is DPO's loss on
    clean labels; on a single pair it may be negative.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        label_smoothing: ε in [0, 0.5); 0 is `dpo_loss`.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    _check_label_smoothing(label_smoothing)
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    kept, flipped = F.logsigmoid(z), F.logsigmoid(-z)
    return (-(1 - label_smoothing) * kept + label_smoothing * flipped) / (1 - 2 * label_smoothing)


@check_shapes
def offset_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    margin: Float[Tensor, " B"] | float,
) -> Float[Tensor, " B"]:
    """ODPO, for pairs of which it is known by how much one is better: -log σ(z - margin).

    Amini et al. 2024, section 3, https://arxiv.org/abs/2402.10571, where the margin is a multiple of the difference of
    scores, or of their logarithms; it is that of `bradley_terry_loss`, on implicit rewards.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        margin: (B,) or a number: by how much the implicit reward of y_w should be ahead; 0 is `dpo_loss`.

    Returns:
        (B,) losses; log 2 where z is exactly the margin.
    """
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    return -F.logsigmoid(z - margin)


@check_shapes
def soft_label_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    margin: Float[Tensor, " B"] | float,
) -> Float[Tensor, " B"]:
    """DPO for pairs whose rewards are known: -p log σ(z) - (1 - p) log σ(-z), p = σ(margin).

    Furuta et al. 2024, section 3.1, https://arxiv.org/abs/2409.06691 (their conservative form), with the preference
    probability that Bradley-Terry gives to a difference of rewards: `dpo_loss` in the mean over labels drawn by it. Its
    least is at z = margin, so that on any pairs that tie all responses together the optimum is π*, however the pairs
    were drawn; with labels that never err, `dpo_loss` has none.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        margin: (B,) or a number: the reward of y_w less that of y_l.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    prefers = torch.sigmoid(torch.as_tensor(margin, dtype=z.dtype, device=z.device))
    return -prefers * F.logsigmoid(z) - (1 - prefers) * F.logsigmoid(-z)


@check_shapes
def ipo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """IPO, a target for the margin instead of "more is better": (h_w - h_l - 1/(2β))².

    Azar et al. 2023, Eq. 17 with τ = β, https://arxiv.org/abs/2310.12036. The paper sums over tokens;
    `length_normalized_ipo_loss` averages.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: more than 0; the larger, the nearer the policy stays.

    Returns:
        (B,) losses; 0 where h_w - h_l = 1/(2β), 1/(4β²) when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return (h_w - h_l - 1 / (2 * beta)).square()


@check_shapes
def hinge_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """Hinge on the margin: max(0, 1 - z).

    Zhao et al. 2023 (SLiC-HF), section 2, https://arxiv.org/abs/2305.10425, with the log-ratios to the reference of
    Liu et al. 2023 (RSO), https://arxiv.org/abs/2309.06657, where β is γ.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: the reciprocal of the margin h_w - h_l at which a pair is done.

    Returns:
        (B,) losses; 1 when policy and reference agree, 0 without gradient from z = 1 on.
    """
    return F.relu(1 - _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta))


@check_shapes
def exo_pair_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    label_smoothing: float = 1e-3,
) -> Float[Tensor, " B"]:
    """EXO on pairs, a reverse KL: σ(z) log(σ(z) / (1 - ε)) + σ(-z) log(σ(-z) / ε).

    Ji et al. 2024, Eq. 16 with K = 2, https://arxiv.org/abs/2402.00856: KL from the policy's preference (σ(z), σ(-z))
    to the smoothed label (1 - ε, ε), where DPO's is the forward one.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        label_smoothing: ε in (0, 0.5); at 0 the loss would be infinite.

    Returns:
        (B,) losses, never negative; 0 at z = logit(1 - ε).
    """
    _check_label_smoothing(label_smoothing, zero_allowed=False)
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    kept = z.sigmoid() * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    flipped = (-z).sigmoid() * (F.logsigmoid(-z) - math.log(label_smoothing))
    return kept + flipped


@check_shapes
def discopop_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    temperature: float = 0.05,
) -> Float[Tensor, " B"]:
    """DiscoPOP (log-ratio modulated): (1 - σ(z/τ)) (-log σ(z)) + σ(z/τ) exp(-z).

    Lu et al. 2024, Eq. 5, https://arxiv.org/abs/2406.08414. Found by search, and not convex: with τ = 0.05 it rises
    from z = -0.119 to 0.072, so pairs near the reference are first pushed the wrong way. z is clamped before `exp`,
    where the paper's form is ∞ · 0.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        temperature: τ, more than 0: how sharply the loss changes from logistic (z < 0) to exponential (z > 0).

    Returns:
        (B,) losses; ½ (log 2 + 1) when policy and reference agree.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature ({temperature}) must be more than 0, and finite")
    z = _margin(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta)
    exponential = torch.exp(-z.clamp(min=-MAX_LOGRATIO))
    share = (z / temperature).sigmoid()
    return (1 - share) * -F.logsigmoid(z) + share * exponential


def _margin(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """Z: the margin of the implicit rewards."""
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return beta * (h_w - h_l)


def _check_label_smoothing(label_smoothing: float, zero_allowed: bool = True) -> None:
    if not (0 <= label_smoothing < 0.5) or (label_smoothing == 0 and not zero_allowed):
        interval = "[0, 0.5)" if zero_allowed else "(0, 0.5)"
        raise ValueError(f"label_smoothing ({label_smoothing}) must be in {interval}: at 0.5 labels say nothing")
