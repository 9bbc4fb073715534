"""Odds-ratio preference optimisation: fine-tuning and preferences in one stage."""

import math
from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.reference_free import ReferenceFreeModule
from lit_rlhf.errors import require
from lit_rlhf.losses import orpo_loss
from lit_rlhf.losses.reference_free import log_odds_of


class ORPO(ReferenceFreeModule):
    """Odds-ratio preference optimisation: minimise -log π(y_w)/|y_w| - λ log σ(log odds(y_w) - log odds(y_l)).

    Hong et al. 2024, Eq. 6, https://arxiv.org/abs/2403.07691; the odds are those of the geometric mean of a response's
    token probabilities.

    Args:
        policy: folder or hub name of the causal LM to start from; a pretrained one will do, as this fine-tunes, too.
        odds_coef: λ, weight of the odds ratio beside the likelihood; the paper uses 0.1 to 1.
        kwargs: see `ReferenceFreeModule`.
    """

    prefix = "orpo"

    def __init__(self, policy: str = "demo", odds_coef: float = 0.1, **kwargs: Any) -> None:
        super().__init__(policy, **kwargs)
        require(0 < odds_coef < math.inf, "odds_coef", odds_coef, "more than 0 (at 0 it is SFT on chosen) and finite")
        self.odds_coef = odds_coef

    def losses_of(self, chosen: Tensor, rejected: Tensor, chosen_lengths: Tensor, rejected_lengths: Tensor) -> Tensor:
        """(B,) losses of pairs."""
        return orpo_loss(chosen, rejected, chosen_lengths, rejected_lengths, self.odds_coef)

    def reward_of(self, logprobs: Tensor, lengths: Tensor) -> Tensor:
        """(B,) log-odds of the mean."""
        return log_odds_of(logprobs / lengths)
