"""Simple preference optimisation: the mean log-prob of a response is its reward."""

import math
from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.reference_free import ReferenceFreeModule
from lit_rlhf.errors import require
from lit_rlhf.losses import simpo_loss


class SimPO(ReferenceFreeModule):
    """Simple preference optimisation: minimise -log σ(β log π(y_w)/|y_w| - β log π(y_l)/|y_l| - γ).

    Meng et al. 2024, Eq. 6, https://arxiv.org/abs/2405.14734

    Args:
        policy: folder or hub name of the causal LM to start from, normally the SFT model.
        beta: scale of the reward, per token; the paper uses 2 to 10.
        target_margin: γ, by how much the chosen reward should be ahead; the paper advises half of β at first.
        nll_coef: weight of -log π(y_w)/|y_w| beside it; above 0 this is CPO-SimPO.
        kwargs: see `ReferenceFreeModule`.
    """

    prefix = "simpo"

    def __init__(
        self,
        policy: str = "demo",
        beta: float = 2.0,
        target_margin: float = 1.0,
        nll_coef: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(policy, **kwargs)
        require(0 < beta < math.inf, "beta", beta, "more than 0 and finite")
        require(0 <= target_margin < math.inf, "target_margin", target_margin, "0 or more and finite")
        require(0 <= nll_coef < math.inf, "nll_coef", nll_coef, "0 or more and finite")
        self.beta, self.target_margin, self.nll_coef = beta, target_margin, nll_coef

    def losses_of(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """(B,) losses of pairs."""
        settings = self.beta, self.target_margin, self.nll_coef
        return simpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, *settings)

    def reward_of(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """(B,) β log π(y)/|y|."""
        return self.beta * logprobs / lengths
