"""AOT: preference optimisation by optimal transport, between the distributions in a batch instead of pair by pair.

Arguments as in `dpo_loss`. The batch is the sample whose quantiles are compared: other than all other losses of this
folder, these depend on the split into micro-batches, and more pairs in a micro-batch make better quantiles.

Axes: B pairs. Log-probabilities are in nats, summed over the response tokens.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


@check_shapes
def aot_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """AOT, paired: -log σ(β (u_(i) - v_(i))), u the policy's and v the reference's margins, each sorted in the batch.

    Melnyk et al. 2024, section 3, https://arxiv.org/abs/2406.05882: the policy's margins log π(y_w) - log π(y_l) are to
    dominate the reference's stochastically, quantile by quantile.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses in order of quantiles, not of pairs; log 2 for each when policy and reference agree.
    """
    margins = (chosen_logprobs - rejected_logprobs).sort().values
    ref_margins = (ref_chosen_logprobs - ref_rejected_logprobs).sort().values
    return -F.logsigmoid(beta * (margins - ref_margins))


@check_shapes
def aot_unpaired_loss(
    chosen_logprobs: Float[Tensor, " B"],
    rejected_logprobs: Float[Tensor, " B"],
    ref_chosen_logprobs: Float[Tensor, " B"],
    ref_rejected_logprobs: Float[Tensor, " B"],
    beta: float,
) -> Float[Tensor, " B"]:
    """AOT, unpaired: -log σ(β (u_(i) - v_(i))), u the chosen and v the rejected log-ratios, each sorted in the batch.

    Melnyk et al. 2024, section 3, https://arxiv.org/abs/2406.05882: chosen rewards are to dominate rejected ones as
    distributions; who was paired with whom does not matter.

    Args:
        chosen_logprobs: (B,) as in `dpo_loss`.
        rejected_logprobs: (B,) likewise.
        ref_chosen_logprobs: (B,) likewise.
        ref_rejected_logprobs: (B,) likewise.
        beta: as in `dpo_loss`.

    Returns:
        (B,) losses in order of quantiles, not of pairs; log 2 for each when policy and reference agree.
    """
    h_w, h_l = chosen_logprobs - ref_chosen_logprobs, rejected_logprobs - ref_rejected_logprobs
    return -F.logsigmoid(beta * (h_w.sort().values - h_l.sort().values))
