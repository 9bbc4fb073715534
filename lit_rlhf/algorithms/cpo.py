"""Contrastive preference optimisation: DPO against a uniform reference, and cloning of the chosen response."""

import math
from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.reference_free import ReferenceFreeModule
from lit_rlhf.errors import require
from lit_rlhf.losses import cpo_loss


class CPO(ReferenceFreeModule):
    """Contrastive preference optimisation: minimise -log σ(β (log π(y_w) - log π(y_l))) - α log π(y_w)/|y_w|.

    Xu et al. 2024, Eq. 5, https://arxiv.org/abs/2401.08417

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model.
        beta: how soon a margin counts in full; the paper uses 0.1.
        nll_coef: α, weight of the likelihood of the chosen response, which stands in for the reference.
        kwargs: see `ReferenceFreeModule`.
    """

    prefix = "cpo"

    def __init__(self, policy: str = "demo", beta: float = 0.1, nll_coef: float = 1.0, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)
        require(0 < beta < math.inf, "beta", beta, "more than 0 and finite")
        require(0 <= nll_coef < math.inf, "nll_coef", nll_coef, "0 or more and finite")
        self.beta, self.nll_coef = beta, nll_coef

    def losses_of(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """(B,) losses of pairs."""
        return cpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, self.beta, self.nll_coef)

    def reward_of(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """(B,) β log π(y)."""
        return self.beta * logprobs
