"""DPO under other divergences than the reverse KL: the implicit reward becomes β f'(π/π_ref).

Wang et al. 2023, "Beyond Reverse KL", https://arxiv.org/abs/2309.16240. A *link* is u ↦ f'(u), u = π/π_ref, as a
function of the log-ratio log u. Constants cancel between chosen and rejected and are left out. Where `exp` would
overflow, a link goes on as a straight line, so that a response that the policy has given up is still pulled back.

Axes: B pairs. Log-probabilities are in nats, summed over the response tokens.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.losses.kl import MAX_LOGRATIO


def reverse_kl_link(logratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL(π‖π_ref): f'(u) = log u (+ 1). `f_dpo_loss` with it is `dpo_loss`.

    Args:
        logratio: any shape, log π - log π_ref.

    Returns:
        The same shape.
    """
    return logratio


def forward_kl_link(logratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """KL(π_ref‖π): f'(u) = -1/u, Table 1; below a log-ratio of -20 its tangent there.

    Args:
        logratio: any shape, log π - log π_ref.

    Returns:
        The same shape, negative.
    """
    return -torch.exp(_clamped(-logratio)) - _line_past_the_clamp(-logratio)


def jensen_shannon_link(logratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Jensen-Shannon: f'(u) = log(2u/(1 + u)) = log 2 + log σ(log u), Table 1; without log 2, which cancels.

    Args:
        logratio: any shape, log π - log π_ref.

    Returns:
        The same shape, negative: no response can earn more than a bounded reward.
    """
    return F.logsigmoid(logratio)


def alpha_link(alpha: float) -> Callable[[Tensor], Tensor]:
    """The α-divergence between reverse KL (α → 0) and forward KL (α = 1): f'(u) = (1 - u^(-α))/α, Table 1.

    Below a log-ratio of -20/α it is its tangent there.

    Args:
        alpha: in (0, 1].

    Returns:
        The link.
    """
    if not 0 < alpha <= 1:
        raise ValueError(f"alpha ({alpha}) must be in (0, 1]; its limit 0 is reverse_kl_link")

    def link(logratio: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        exponent = -alpha * logratio
        return -(torch.expm1(_clamped(exponent)) + _line_past_the_clamp(exponent)) / alpha

    return link


@check_shapes
def f_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    link: Callable[[Tensor], Tensor] = reverse_kl_link,
) -> Float[Tensor, " B"]:
    """f-DPO: -log σ(β f'(π(y_w)/π_ref(y_w)) - β f'(π(y_l)/π_ref(y_l))).

    Wang et al. 2023, with the f' of its Table 1, https://arxiv.org/abs/2309.16240

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        link: f' as a function of the log-ratio: one of this module, or your own.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    if not callable(link):
        raise ValueError(
            f"link ({link!r}) must be a function of the log-ratio; in a YAML choose forward_kl_dpo_loss, "
            "jensen_shannon_dpo_loss, alpha_dpo_loss or a function of your own that calls f_dpo_loss"
        )
    chosen_reward = beta * link(chosen_logprobs - ref_chosen_logprobs)
    rejected_reward = beta * link(rejected_logprobs - ref_rejected_logprobs)
    return -F.logsigmoid(chosen_reward - rejected_reward)


@check_shapes
def forward_kl_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """f-DPO under KL(π_ref‖π): `f_dpo_loss` with `forward_kl_link`.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return f_dpo_loss(*pair, beta, forward_kl_link)


@check_shapes
def jensen_shannon_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """f-DPO under the Jensen-Shannon divergence: `f_dpo_loss` with `jensen_shannon_link`.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return f_dpo_loss(*pair, beta, jensen_shannon_link)


@check_shapes
def alpha_dpo_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
    alpha: float,
) -> Float[Tensor, " B"]:
    """f-DPO under an α-divergence: `f_dpo_loss` with `alpha_link(alpha)`.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.
        alpha: in (0, 1]; near 0 it is `dpo_loss`, at 1 `forward_kl_dpo_loss`.

    Returns:
        (B,) losses; log 2 for each pair when policy and reference agree.
    """
    pair = (chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return f_dpo_loss(*pair, beta, alpha_link(alpha))


def _clamped(exponent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """min(exponent, 20), with slope 1 at 20 itself, where torch's own clamp has slope 0 from release 2.14 on."""
    return exponent.masked_fill(exponent > MAX_LOGRATIO, MAX_LOGRATIO)


def _line_past_the_clamp(exponent: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """What to add to exp(min(exponent, 20)), so that it goes on past 20 with the value and slope that it has there."""
    return math.exp(MAX_LOGRATIO) * F.relu(exponent - MAX_LOGRATIO)
