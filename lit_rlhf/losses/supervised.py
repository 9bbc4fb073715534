"""Losses with a target in the data: demonstrations and steps. Axes: K steps; any shape for tokens."""

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
