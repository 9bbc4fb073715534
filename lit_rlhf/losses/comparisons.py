"""Losses of a reward model: what the scores of two responses have to do with how they compare. Axes: B pairs.

Further ones are functions of the same arguments, and options by name.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


@check_shapes
def bradley_terry_loss(
    chosen_scores: Float[Tensor, " B"], rejected_scores: Float[Tensor, " B"], margin: Float[Tensor, " B"] | float = 0.0
) -> Float[Tensor, " B"]:
    """Loss of each pair: -log σ(r(x, y_w) - r(x, y_l) - margin).

    Bradley & Terry 1952; Ouyang et al. 2022, Eq. 1, https://arxiv.org/abs/2203.02155. The margin is that of
    Touvron et al. 2023, Eq. 2, https://arxiv.org/abs/2307.09288.

    Args:
        chosen_scores: (B,) scalar reward r of the preferred response.
        rejected_scores: (B,) r of the other.
        margin: (B,) or a number: by how much chosen should beat rejected; 0 is the plain model.

    Returns:
        (B,) losses; log 2 where the scores differ by exactly the margin.
    """
    return -F.logsigmoid(chosen_scores - rejected_scores - margin)


@check_shapes
def centring_loss(chosen_scores: Float[Tensor, " B"], rejected_scores: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Loss of each pair that holds its scores around 0, which preferences leave open: (r(x, y_w) + r(x, y_l))².

    Eisenstein et al. 2023, https://arxiv.org/abs/2312.09244

    Args:
        chosen_scores: (B,) as in `bradley_terry_loss`.
        rejected_scores: (B,) likewise.

    Returns:
        (B,) losses; 0 where the two scores are opposite.
    """
    return (chosen_scores + rejected_scores).square()


@check_shapes
def scaled_bradley_terry_loss(
    chosen_scores: Float[Tensor, " B"], rejected_scores: Float[Tensor, " B"], margin: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Loss of each pair, which counts as much as its margin: -margin log σ(r(x, y_w) - r(x, y_l)).

    Wang et al. 2024 (HelpSteer2-Preference), Eq. 3, https://arxiv.org/abs/2410.01257: as if the pair had been compared
    `margin` times.

    Args:
        chosen_scores: (B,) as in `bradley_terry_loss`.
        rejected_scores: (B,) likewise.
        margin: (B,) how much better chosen is, 0 or more.

    Returns:
        (B,) losses; 0 where the margin is.
    """
    return -margin * F.logsigmoid(chosen_scores - rejected_scores)


@check_shapes
def score_difference_loss(
    chosen_scores: Float[Tensor, " B"], rejected_scores: Float[Tensor, " B"], margin: Float[Tensor, " B"]
) -> Float[Tensor, " B"]:
    """Regression of scores on known ones, by their differences: (r(x, y_w) - r(x, y_l) - margin)².

    The margin is the difference of two ratings, as of annotators who gave points. What is added to all ratings of a
    prompt, a mild or a strict annotator, falls out.

    Args:
        chosen_scores: (B,) as in `bradley_terry_loss`.
        rejected_scores: (B,) likewise.
        margin: (B,) the rating of chosen less that of rejected.

    Returns:
        (B,) losses; 0 where the scores differ by the margin.
    """
    return (chosen_scores - rejected_scores - margin).square()


@check_shapes
def rao_kupper_loss(
    chosen_scores: Float[Tensor, " B"],
    rejected_scores: Float[Tensor, " B"],
    margin: Float[Tensor, " B"],
    threshold: float = math.log(2),
) -> Float[Tensor, " B"]:
    """Bradley-Terry with ties: -log σ(d - η) of a pair that was won, -log P(tie) of one that was not.

    Here d = r(x, y_w) - r(x, y_l) and P(tie) = (e^{2η} - 1) σ(d - η) σ(-d - η); with σ(-d - η) that the other one wins,
    the three probabilities add up to 1.

    Rao & Kupper 1967, https://doi.org/10.2307/2282923; for reward models Liu et al. 2024,
    https://arxiv.org/abs/2410.05328. Ties that are left out, or called one way by chance, bias the differences.

    Args:
        chosen_scores: (B,) as in `bradley_terry_loss`.
        rejected_scores: (B,) likewise.
        margin: (B,) 0 = neither is better, else chosen is.
        threshold: η > 0: equal responses tie with probability tanh(η/2), 1/3 at log 2.

    Returns:
        (B,) losses.

    Raises:
        ValueError: the threshold is not above 0.
    """
    if not 0 < threshold < math.inf:
        raise ValueError(f"threshold ({threshold}) must be a number above 0")
    difference = chosen_scores - rejected_scores
    won, lost = F.logsigmoid(difference - threshold), F.logsigmoid(-difference - threshold)
    return -torch.where(margin == 0, math.log(math.expm1(2 * threshold)) + won + lost, won)
