"""Several reward models as one reward, which is careful where they disagree."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import require, require_types
from lit_rlhf.models.holding import FrozenDtype
from lit_rlhf.models.policy import Policy
from lit_rlhf.rollout.rewards import Reward, RewardModelReward


class EnsembleReward(Reward):
    """Mean score of several reward models less k times their standard deviation, or the least of their scores.

    A policy that hacks one of them is paid little for it, as the others disagree. Coste et al. 2023,
    https://arxiv.org/abs/2310.02743, take the least score, or penalise the variance; Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, the standard deviation, which is in units of the score. It is that over the
    members, √(Σ (r_i - mean)² / n).

    Their scores must have one scale: train them with `normalize: mean_and_std`, from different seeds or data.

    Args:
        models: folders or hub names of two reward models or more; adapters stand on the policy's base where they can.
        uncertainty_coef: k, 0 or more, 0 being the mean; null = the least score.
        max_tokens: of each member, as in `RewardModelReward`.
        frozen_dtype: of each member, as in `RewardModelReward`.
        trust_remote_code: run model code that comes with the weights.
    """

    def __init__(
        self,
        models: list[str],
        uncertainty_coef: float | None = 1.0,
        max_tokens: int = 16_384,
        frozen_dtype: FrozenDtype | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        require_types(EnsembleReward.__init__, locals())
        several = 2 <= len(models) == len(set(models))
        require(several, "models", models, "two reward models or more, each once; of one alone, RewardModelReward")
        careful = uncertainty_coef is None or 0 <= uncertainty_coef < math.inf
        require(careful, "uncertainty_coef", uncertainty_coef, "0 or more and finite, or null for the least score")
        self.members = [RewardModelReward(model, max_tokens, frozen_dtype, trust_remote_code) for model in models]
        self.uncertainty_coef = uncertainty_coef

    def __str__(self) -> str:
        return ", ".join(map(str, self.members))

    @property
    def stands_on(self) -> Mapping[str, str]:  # type: ignore[override]
        """The folders of all members."""
        return {folder: held for member in self.members for folder, held in member.stands_on.items()}

    def share(self, policy: Policy) -> None:
        """Let each adapter stand on the policy's base, where that is its own."""
        for member in self.members:
            member.share(policy)

    def bind(self, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        """Move all to the policy's device; refuse a policy whose tokens mean something else."""
        for member in self.members:
            member.bind(tokenizer, device)

    def reads(self, names: Iterable[str]) -> set[str]:
        """None: they score by tokens."""
        return set()

    def networks(self) -> Iterator[nn.Module]:
        """Members that are networks of their own."""
        for member in self.members:
            yield from member.networks()

    def views(self, name: str) -> dict[str, Any]:
        """Each member by its number."""
        numbered = [member.views(f"{name} {number}") for number, member in enumerate(self.members, 1)]
        return {role: view for views in numbered for role, view in views.items()}

    def __call__(self, prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], **columns: Any) -> np.ndarray:
        """(n,) scores."""
        scores = np.stack([member(prompts, responses) for member in self.members])
        if self.uncertainty_coef is None:
            return scores.min(axis=0)
        return scores.mean(axis=0) - self.uncertainty_coef * scores.std(axis=0)
