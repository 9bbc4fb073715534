"""The running mean of implicit rewards that BCO classifies against."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.errors import require_alike


class RewardShift:
    """δ: the mean implicit reward ½ (β h_w + β h_l) of the pairs of all steps before, on all ranks.

    Jung et al. 2024, section 4, https://arxiv.org/abs/2404.04656. During a step it stays, so that no split of the step
    into micro-batches changes a loss.
    """

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.pairs_seen = torch.zeros(())
        self.step_rewards: list[Tensor] = []  # of the optimiser step's pairs so far

    def observe(self, rewards: Tensor) -> None:
        """Take down the implicit rewards of a micro-batch, (B,)."""
        self.step_rewards.append(rewards.detach())

    def update(self, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """After a step: take what was observed into the mean."""
        rewards, self.step_rewards = torch.cat(self.step_rewards), []
        total, count = sum_over_ranks(torch.stack([rewards.sum(), rewards.new_tensor(float(len(rewards)))]))
        mean, seen = self.mean.to(total.device), self.pairs_seen.to(total.device) + count
        self.mean, self.pairs_seen = mean + (total - count * mean) / seen, seen

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"mean": self.mean, "pairs_seen": self.pairs_seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        require_alike(state, self.state_dict(), "reward_shift", ("mean", "pairs_seen"))
        self.mean, self.pairs_seen = state["mean"], state["pairs_seen"]
