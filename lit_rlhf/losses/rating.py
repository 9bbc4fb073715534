"""Siblings of DPO that also say where the probability of each response should go, not only their margin.

Arguments as in `dpo_loss`. In the docstrings, with y_w chosen and y_l rejected, h_w = log π(y_w|x) - log π_ref(y_w|x)
and h_l likewise are the log-ratios.

Axes: B pairs. Log-probabilities are in nats, summed over the response tokens.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


@check_shapes
def nca_pair_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """NCA on pairs: -log σ(β h_w) - ½ log σ(-β h_w) - ½ log σ(-β h_l).

    Chen et al. 2024, section 4.1, https://arxiv.org/abs/2402.05369, for K = 2 responses with one-hot rewards. Each
    response is rated by itself, so the chosen log-probability cannot fall for the sake of the margin.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses; 2 log 2 when policy and reference agree; in h_w least at σ(β h_w) = 2/3, that is β h_w = log 2.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return -F.logsigmoid(beta * h_w) - 0.5 * F.logsigmoid(-beta * h_w) - 0.5 * F.logsigmoid(-beta * h_l)


@check_shapes
def bco_pair_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    reward_shift: Float[Tensor, ""] | float = 0.0,
) -> Float[Tensor, " B"]:
    """BCO on pairs, a classifier good against bad: -log σ(β h_w - δ) - log σ(-(β h_l - δ)).

    Jung et al. 2024, section 4, https://arxiv.org/abs/2404.04656

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        reward_shift: δ, a running mean of the implicit rewards ½ (β h_w + β h_l) that the caller keeps, () or a number;
            no gradient.

    Returns:
        (B,) losses; 2 log 2 when policy and reference agree and δ = 0.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return -F.logsigmoid(beta * h_w - reward_shift) - F.logsigmoid(-(beta * h_l - reward_shift))


@check_shapes
def sppo_hard_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """SPPO with hard labels, a target for each response: (h_w - 1/(2β))² + (h_l + 1/(2β))².

    Wu et al. 2024, Eq. 4.7 with η = 1/β and P(y_w beats y_l) = 1, https://arxiv.org/abs/2405.00675

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) under the policy of the iteration before, the paper's π_t.
        ref_rejected_logprobs: (B,) likewise.
        beta: 1/η, more than 0.

    Returns:
        (B,) losses; 0 at h_w = 1/(2β), h_l = -1/(2β).
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return (h_w - 0.5 / beta).square() + (h_l + 0.5 / beta).square()


@check_shapes
def apo_zero_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """APO-zero, chosen up and rejected down: 1 - σ(β h_w) + σ(β h_l).

    D'Oosterlinck et al. 2024, Eq. 7, https://arxiv.org/abs/2408.06266. For chosen responses better than the policy's.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses between 0 and 2; 1 when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return (-beta * h_w).sigmoid() + (beta * h_l).sigmoid()


@check_shapes
def apo_down_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """APO-down, both down and rejected more so: σ(β h_w) + 1 - σ(z).

    D'Oosterlinck et al. 2024, Eq. 8, https://arxiv.org/abs/2408.06266. For chosen responses worse than the policy's.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses between 0 and 2; 1 when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return (beta * h_w).sigmoid() + (-beta * (h_w - h_l)).sigmoid()
