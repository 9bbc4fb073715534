"""Losses of preference pairs that count tokens: log-ratios per token, and the likelihood of the chosen response.

Axes and symbols as in `preference.py`; |y| is the number of tokens of a response.
"""

import math

import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import require
from lit_rlhf.losses.preference import dpo_loss


@check_shapes
def length_normalized_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """DPO on log-ratios per token: -log σ(β (h_w/|y_w| - h_l/|y_l|)).

    Lambert et al. 2024 (Tülu 3), https://arxiv.org/abs/2411.15124

    Args:
        chosen_logprobs: (B,) summed over the response tokens.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: per token, so larger than in `dpo_loss`; the paper uses 5.
        chosen_lengths: (B,) number of response tokens in y_w.
        rejected_lengths: (B,) likewise in y_l.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return -F.logsigmoid(beta * (h_w / chosen_lengths - h_l / rejected_lengths))


@check_shapes
def length_normalized_ipo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """IPO on log-ratios per token, as its authors advise: (h_w/|y_w| - h_l/|y_l| - 1/(2β))².

    Azar et al. 2023, Eq. 17 with τ = β, https://arxiv.org/abs/2310.12036

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: more than 0; 1/(2β) is in nats per token.
        chosen_lengths: (B,) number of response tokens in y_w.
        rejected_lengths: (B,) likewise in y_l.

    Returns:
        (B,) losses; 1/(4β²) when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return (h_w / chosen_lengths - h_l / rejected_lengths - 1 / (2 * beta)).square()


@check_shapes
def rpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    chosen_lengths: Shaped[Tensor, " B"],
    nll_coef: float = 1.0,
) -> Float[Tensor, " B"]:
    """DPO and the likelihood of the chosen response: -log σ(z) - α log π(y_w|x)/|y_w|.

    Pang et al. 2024, Eq. 1, https://arxiv.org/abs/2404.19733; the second term keeps chosen log-probs from falling.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        chosen_lengths: (B,) number of response tokens in y_w.
        nll_coef: α, 0 or more; 0 is `dpo_loss`.

    Returns:
        (B,) losses.
    """
    require(0 <= nll_coef < math.inf, "nll_coef", nll_coef, "0 or more, and finite")
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return dpo_loss(*pair, beta) - nll_coef * chosen_logprobs / chosen_lengths


@check_shapes
def chosen_nll_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    chosen_lengths: Shaped[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """The likelihood of the chosen response alone, a term for mixtures: -log π(y_w|x)/|y_w|.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) does not count, nor do the references and β.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: likewise.
        chosen_lengths: (B,) number of response tokens in y_w.

    Returns:
        (B,) losses in nats per token.
    """
    return -chosen_logprobs / chosen_lengths


@check_shapes
def wpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    chosen_lengths: Shaped[Tensor, " B"],
    rejected_lengths: Shaped[Tensor, " B"],
) -> Float[Tensor, " B"]:
    """DPO weighted by how likely the policy is to write the pair: -w log σ(z).

    Zhou et al. 2024 (WPO), section 3.2, https://arxiv.org/abs/2406.11827, without the alignment of weights there, which
    asks for whole distributions: log w = log π(y_w)/|y_w| + log π(y_l)/|y_l|, without a gradient. Pairs off the policy
    count less, as if they were its own.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        chosen_lengths: (B,) number of response tokens in y_w.
        rejected_lengths: (B,) likewise in y_l.

    Returns:
        (B,) losses, at most those of DPO; weights are below 1, so that the learning rate may be larger.
    """
    weights = (chosen_logprobs / chosen_lengths + rejected_logprobs / rejected_lengths).detach().exp()
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return weights * dpo_loss(*pair, beta)
