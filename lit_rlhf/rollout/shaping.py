"""From the rewards of whole responses to the scores that are learnt from."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from lit_rlhf.engine.memory import numbers
from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import UserError, require, require_alike, require_types
from lit_rlhf.losses.advantages import Moments


def nothing_seen() -> Moments:
    """Moments of no rewards yet: numbers, where a run is planned on tensors without any, too."""
    with numbers():
        return Moments(*torch.zeros(3, dtype=torch.float64))


@dataclass(frozen=True)
class ShapingSettings:
    """What is done to rewards; the arguments of `RewardShaping` say what each means."""

    normalize: Literal["scale", "standardize"] | None
    clip: float | None
    length_penalty: float
    length_budget: int
    missing_end_penalty: float
    missing_end_score: float | None

    def __post_init__(self) -> None:
        """Refuse what means nothing, and options that leave each other nothing to do."""
        clips = self.clip is None or 0 < self.clip < math.inf
        require(clips, "clip", self.clip, "more than 0 and finite, or null for no clipping")
        for name in ("length_penalty", "missing_end_penalty"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 or more, as it is subtracted, and finite")
        require(self.length_budget >= 0, "length_budget", self.length_budget, "0 or more tokens")
        finite = self.missing_end_score is None or math.isfinite(self.missing_end_score)
        require(finite, "missing_end_score", self.missing_end_score, "a finite number, or null")
        if self.length_budget and not self.length_penalty:
            raise UserError(f"length_budget ({self.length_budget}) says what length_penalty (0) spares: set that too")
        if self.missing_end_penalty and self.missing_end_score is not None:
            raise UserError(
                f"missing_end_penalty ({self.missing_end_penalty}) subtracts from the score of a cut response and "
                f"missing_end_score ({self.missing_end_score}) replaces it: give one of them"
            )


class RewardShaping:
    """What is done to rewards before they are learnt from; by default nothing.

    In this order: normalise, clip, length penalty, missing end. Then the score joins the KL penalty in the token
    rewards, which may be whitened. Logged as `rollout/shaped_score`; `rollout/score` stays the reward as it came.

    Args:
        normalize: "scale" divides rewards by the standard deviation of all rewards of the run so far; "standardize"
            subtracts their mean before; null = neither. The KL coefficient then weighs against this unit.
        clip: hold rewards within ±clip; null = no clipping.
        length_penalty: subtracted for each response token past length_budget.
        length_budget: response tokens that cost nothing.
        missing_end_penalty: subtracted from the score of a response that the length limit, not a stop token, ended.
        missing_end_score: the score of such a response in place of its own; null = its own, less the penalty.
        whiten: scale the token rewards, KL penalty included, to variance 1 over the rollout of all ranks, around their
            mean, whose sign means something.
    """

    def __init__(
        self,
        normalize: Literal["scale", "standardize"] | None = None,
        clip: float | None = None,
        length_penalty: float = 0.0,
        length_budget: int = 0,
        missing_end_penalty: float = 0.0,
        missing_end_score: float | None = None,
        whiten: bool = False,
    ) -> None:
        require_types(RewardShaping.__init__, locals())
        self.settings = ShapingSettings(
            normalize, clip, length_penalty, length_budget, missing_end_penalty, missing_end_score
        )
        self.whiten = whiten
        self.seen = nothing_seen()  # all rewards of the run so far, of all ranks

    def observe(self, rewards: Moments) -> None:
        """Take a rollout into the running statistics.

        Args:
            rewards: moments of its rewards over all ranks.
        """
        self.seen = Moments(*(old + new for old, new in zip(self.seen, rewards, strict=True)))

    @property
    def scale(self) -> float:
        """What rewards are multiplied by: 1 / their standard deviation, if that is asked for and they are not equal."""
        varies = self.seen.variance > 1e-12 * self.seen.mean.square()
        return 1 / self.seen.variance.sqrt().item() if self.settings.normalize is not None and varies else 1.0

    @check_shapes
    def scores(
        self, rewards: Float[Tensor, " B"], lengths: Shaped[Tensor, " B"], cut: Bool[Tensor, " B"]
    ) -> Float[Tensor, " B"]:
        """Scores to learn from.

        Args:
            rewards: (B,) as the reward function gave them.
            lengths: (B,) response tokens.
            cut: (B,) bool, True = the length limit ended the response.

        Returns:
            (B,) float32.
        """
        settings, scores = self.settings, rewards.double()
        if settings.normalize == "standardize":
            scores = scores - self.seen.mean
        scores = scores * self.scale
        if settings.clip is not None:
            scores = scores.clamp(-settings.clip, settings.clip)
        scores = scores - settings.length_penalty * (lengths - settings.length_budget).clamp(min=0)
        ended_badly = scores - settings.missing_end_penalty
        if settings.missing_end_score is not None:
            ended_badly = torch.full_like(scores, settings.missing_end_score)
        return torch.where(cut, ended_badly, scores).float()

    def state_dict(self) -> dict[str, Any]:
        """The running statistics, for the checkpoint."""
        return {"seen": [value.item() for value in self.seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the statistics of a checkpoint."""
        require_alike(state, self.state_dict(), "shaping", ("seen",))
        self.seen = Moments(*torch.tensor(state["seen"], dtype=torch.float64))
