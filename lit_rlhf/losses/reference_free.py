"""Losses of preference pairs without a reference: the policy's own log-probabilities alone.

In the docstrings, with y_w chosen and y_l rejected, m_w = log π(y_w|x)/|y_w| and m_l likewise: means over tokens.

Axes: B pairs. Log-probabilities are in nats, summed over the response tokens.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require

SUREST = -1e-6  # mean log-prob of a response above which its odds count as these: at 0 they are infinite


@check_shapes
def simpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
    beta: float,
    target_margin: float,
    nll_coef: float = 0.0,
) -> Float[Tensor, " B"]:
    """SimPO, the reward being the mean log-prob: -log σ(β m_w - β m_l - γ), and -α m_w.

    Meng et al. 2024, Eq. 6, https://arxiv.org/abs/2405.14734. With α > 0 it is CPO-SimPO, Xu et al.'s likelihood of the
    chosen response beside it.

    Args:
        chosen_logprobs: (B,) log π(y_w|x), summed over the response tokens.
        rejected_logprobs: (B,) log π(y_l|x), likewise.
        chosen_lengths: (B,) response tokens of y_w.
        rejected_lengths: (B,) likewise of y_l.
        beta: per token, so larger than in `dpo_loss`; the paper uses 2 to 10.
        target_margin: γ, by how much the chosen reward should be ahead; the paper uses 0.3 to 1.6, at first β/2.
        nll_coef: α, 0 or more.

    Returns:
        (B,) losses; log 2 where the rewards differ by exactly γ, and α is 0.
    """
    require(0 <= nll_coef < math.inf, "nll_coef", nll_coef, "0 or more, and finite")
    means = chosen_logprobs / chosen_lengths, rejected_logprobs / rejected_lengths
    return -F.logsigmoid(beta * (means[0] - means[1]) - target_margin) - nll_coef * means[0]


@check_shapes
def cpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
    beta: float,
    nll_coef: float = 1.0,
) -> Float[Tensor, " B"]:
    """CPO, DPO against a uniform reference beside cloning: -log σ(β (log π(y_w|x) - log π(y_l|x))) - α m_w.

    Xu et al. 2024, Eq. 5, https://arxiv.org/abs/2401.08417, whose α is 1; the likelihood is a mean over tokens, as in
    the authors' code.

    Args:
        chosen_logprobs: (B,) as in `simpo_loss`.
        rejected_logprobs: (B,) likewise.
        chosen_lengths: (B,) likewise.
        rejected_lengths: (B,) does not count.
        beta: as in `dpo_loss`; the paper uses 0.1.
        nll_coef: α, 0 or more.

    Returns:
        (B,) losses.
    """
    require(0 <= nll_coef < math.inf, "nll_coef", nll_coef, "0 or more, and finite")
    margin = chosen_logprobs - rejected_logprobs
    return -F.logsigmoid(beta * margin) - nll_coef * chosen_logprobs / chosen_lengths


@check_shapes
def orpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
    odds_coef: float,
) -> Float[Tensor, " B"]:
    """ORPO, fine-tuning with a penalty on the odds: -m_w - λ log σ(log odds(m_w) - log odds(m_l)).

    Hong et al. 2024, Eq. 6 and 7, https://arxiv.org/abs/2403.07691, with odds(m) = e^m / (1 - e^m).

    Args:
        chosen_logprobs: (B,) as in `simpo_loss`.
        rejected_logprobs: (B,) likewise.
        chosen_lengths: (B,) likewise.
        rejected_lengths: (B,) likewise.
        odds_coef: λ, 0 or more; the paper uses 0.1 to 1.

    Returns:
        (B,) losses in nats per token; -m_w + λ log 2 where both responses are as likely per token.
    """
    require(0 <= odds_coef < math.inf, "odds_coef", odds_coef, "0 or more, and finite")
    means = chosen_logprobs / chosen_lengths, rejected_logprobs / rejected_lengths
    log_odds = log_odds_of(means[0]) - log_odds_of(means[1])
    return -means[0] - odds_coef * F.logsigmoid(log_odds)


@check_shapes
def log_odds_of(mean_logprobs: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(B,) log(p / (1 - p)), p the geometric mean of a response's token probabilities."""
    bounded = mean_logprobs.clamp(max=SUREST)
    return bounded - torch.log(-torch.expm1(bounded))
