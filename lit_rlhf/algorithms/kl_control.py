"""The KL penalty of on-policy training: where it is charged, by which estimator, and the coefficient that weighs it."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lit_rlhf.engine.shapes import check_shapes
from lit_rlhf.errors import UserError, require, require_alike, require_types
from lit_rlhf.losses.kl import ESTIMATORS, clamped_logratio, sequence_k2, sequence_sums, with_k2_gradient


@dataclass(frozen=True)
class KLPenalty:
    """Where KL(π‖π_ref) is charged, and by which estimator.

    In the reward, what a token does to the KL of later ones counts too: PPO then climbs E[r] - β KL of whole responses.
    In the loss, each token's distribution is pulled to the reference's given its prefix alone, with less variance.

    Args:
        place: "reward" subtracts kl_coef * estimate from each token's reward (Ziegler et al. 2019); "loss" adds it to
            each token's loss.
        estimator: k1, k2 or k3 of each token. In the reward, k1 alone has the gradient of the KL: the others, as in
            peers that offer them, have another optimum. In the loss, the gradient is that of the token's KL whichever
            gives the value; "k2_sequence", of the loss alone, has that of the KL of whole responses.
    """

    place: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3", "k2_sequence"] = "k1"

    def __post_init__(self) -> None:
        """Refuse other words."""
        require_types(type(self), vars(self))
        if self.place == "reward" and self.estimator == "k2_sequence":
            raise UserError(
                "kl_penalty: estimator k2_sequence is of whole responses, and no reward of a token: set place: loss, "
                "or estimator: k1, which has the same gradient in the reward"
            )

    def estimate(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """Estimates of each token, of the same shape."""
        return ESTIMATORS[self.estimator.removesuffix("_sequence")](logprobs, ref_logprobs)

    @check_shapes
    def loss(
        self,
        logprobs: Float[Tensor, "*shape"],
        old_logprobs: Float[Tensor, "*shape"],
        ref_logprobs: Float[Tensor, "*shape"],
        sequence_ids: Int[Tensor, "*shape"] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """Estimates for the loss: ρ k with ρ = π/π_old, and the gradient ρ ∇k2 = ρ log(π/π_ref) ∇log π.

        Unbiased in value (k1, k3) and in gradient also once π has left the π_old that the tokens were sampled from:
        E_old[ρ f] = E_π[f]. Of "k2_sequence" ρ, too, is the ratio of whole responses.

        Args:
            logprobs: log π of the tokens, now.
            old_logprobs: log π_old of them, at rollout; carries no gradient.
            ref_logprobs: log π_ref of them; carries no gradient.
            sequence_ids: the response of each, where whole ones are estimated.

        Returns:
            Estimates of the same shape.
        """
        if self.estimator == "k2_sequence":
            assert sequence_ids is not None, "the estimate of whole responses needs to know whose a token is"
            drift = sequence_sums((logprobs - old_logprobs).detach(), sequence_ids)
            return torch.exp(clamped_logratio(drift, torch.zeros_like(drift))) * sequence_k2(
                logprobs, ref_logprobs, sequence_ids
            )
        ratio = torch.exp(clamped_logratio(logprobs, old_logprobs)).detach()
        return ratio * with_k2_gradient(self.estimate(logprobs, ref_logprobs), logprobs, ref_logprobs)


class KLController:
    """The KL coefficient β: after each rollout it may adapt, and it goes on from a checkpoint."""

    kl_coef: float

    def update(self, kl: float, num_episodes: int) -> None:
        """Adapt β after a rollout; this one does not.

        Args:
            kl: mean KL per episode of the last rollout, in nats.
            num_episodes: n, episodes in that rollout, over all ranks.
        """

    def state_dict(self) -> dict[str, Any]:
        """The coefficient as adapted so far, for the checkpoint."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from the coefficient of a checkpoint."""
        require_alike(state, {"kl_coef": 0.0}, "kl", ("kl_coef",))
        self.kl_coef = state["kl_coef"]


class FixedKL(KLController):
    """A KL coefficient that stays: β.

    Args:
        kl_coef: weight of the KL penalty in the reward; 0 switches it off.
    """

    def __init__(self, kl_coef: float = 0.05) -> None:
        require_types(FixedKL.__init__, locals())
        require(0 <= kl_coef < math.inf, "kl_coef", kl_coef, "0 or more and finite")
        self.kl_coef = kl_coef

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore: a fixed coefficient is the config's, also when a run is resumed with another value."""


class AdaptiveKL(KLController):
    """A KL coefficient that steers KL to a target: err = clip(kl/target - 1, ±0.2), β ← β (1 + err n/horizon).

    Ziegler et al. 2019, section 2.2, https://arxiv.org/abs/1909.08593. Other than there, a rollout of several horizons
    halves or doubles β at most.

    Args:
        init_kl_coef: β of the first rollout; more than 0, or it could never grow.
        target: mean KL per episode to hold, in nats; more than 0.
        horizon: episodes over which β changes by at most a factor of about exp(0.2).
    """

    def __init__(self, init_kl_coef: float = 0.05, target: float = 6.0, horizon: int = 10_000) -> None:
        require_types(AdaptiveKL.__init__, locals())
        grows = "more than 0 and finite; for no KL penalty use FixedKL(0)"
        require(0 < init_kl_coef < math.inf, "init_kl_coef", init_kl_coef, grows)
        require(0 < target < math.inf, "target", target, "more than 0 and finite: the error is kl / target - 1")
        require(0 < horizon < math.inf, "horizon", horizon, "more than 0 episodes, and finite")
        self.init_kl_coef = init_kl_coef
        self.kl_coef = init_kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_episodes: int) -> None:
        """Adapt β after a rollout; args as above.

        Raises:
            ValueError: `kl` is NaN, which would stay in β for ever.
        """
        if kl != kl:
            raise ValueError("kl is NaN: log-probabilities of policy or reference are not finite")
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        # A rollout of more than 5 horizons could turn β negative for good: none may more than halve or double it.
        self.kl_coef *= min(max(1 + error * num_episodes / self.horizon, 0.5), 2.0)
