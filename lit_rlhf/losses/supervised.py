"""Losses with a target in the data: demonstrations, pairs, steps. Axes: B pairs; K steps; any shape for tokens."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


def nll(logprobs: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Negative log-likelihood of each token: -log π(y_t|x, y_<t).

    Args:
        logprobs: any shape, log π of the tokens that the loss counts.

    Returns:
        Losses of the same shape; log V for each token when π is uniform over V tokens.
    """
    return -logprobs


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
def process_reward_loss(scores: Float[Tensor, " K"], labels: Float[Tensor, " K"]) -> Float[Tensor, " K"]:
    """Loss of each step: -y log σ(s) - (1 - y) log σ(-s).

    Lightman et al. 2023, section 2.6, https://arxiv.org/abs/2305.20050; with soft labels, Wang et al. 2023
    (Math-Shepherd), Eq. 2, https://arxiv.org/abs/2312.08935.

    Args:
        scores: (K,) s, the log-odds that a step is right.
        labels: (K,) y, 1 = it is right, 0 = it is wrong, between them how probably it is right.

    Returns:
        (K,) losses; log 2 where s is 0, and at the least the entropy of the label, where σ(s) = y.
    """
    return F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
