"""Keep the experts of a mixture equally busy.

Axes: N tokens of all layers with experts, E experts.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes


@check_shapes
def load_balancing_loss(router_logits: Float[Tensor, "N E"], top_k: int) -> Float[Tensor, ""]:
    """E Σ_e f_e P_e: f_e the share of tokens sent to expert e, P_e the mean probability that the router gives it.

    Fedus et al. 2022 (Switch Transformer), Eq. 4 to 6, https://arxiv.org/abs/2101.03961. As in transformers, shares and
    probabilities are means over all layers, and a token that is sent to k experts counts k times: the least is k.

    Args:
        router_logits: (N, E), layer after layer.
        top_k: experts that a token is sent to.

    Returns:
        () float32; `top_k` where all experts are equally busy, E where the same `top_k` do all the work.

    Raises:
        ValueError: there are fewer experts than a token is sent to.
    """
    if not 1 <= top_k <= router_logits.shape[-1]:
        raise ValueError(f"top_k is {top_k} of {router_logits.shape[-1]} experts; expected from 1 to all of them")
    probs = torch.softmax(router_logits.float(), dim=-1)
    sent = torch.zeros_like(probs).scatter(-1, probs.topk(top_k, dim=-1).indices, 1.0)
    return probs.shape[-1] * (sent.mean(0) * probs.mean(0)).sum()
