"""Settings that belong together, each a frozen dataclass that checks itself: constructors only wire."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from torch import nn

from lit_rlhf.errors import UserError, require, require_types
from lit_rlhf.models.holding import require_bitsandbytes
from lit_rlhf.rollout.play import GenerationSettings

LossAverage = Literal["tokens", "responses", "max_new_tokens"]
LEAST_EPS = 1e-37  # steps are computed in float32, where less is 0: 0 / 0 of a weight without a gradient


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule; the arguments of `AlignmentModule` say what each means."""

    learning_rate: float
    weight_decay: float
    adam_betas: tuple[float, float]
    adam_eps: float
    lr_scheduler: Literal["constant", "cosine", "linear"]
    warmup_steps: float
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"

    def __post_init__(self) -> None:
        """Refuse what AdamW could not compute with, and what is not installed."""
        require_types(type(self), vars(self))
        if self.optimizer == "adamw_8bit":
            require_bitsandbytes("optimizer: adamw_8bit")
        steps, what = self.warmup_steps, "0 or more: a whole number of steps, or a share of them below 1"
        counts = 0 <= steps < 1 or (0 < steps < math.inf and steps == int(steps))
        require(counts, "warmup_steps", steps, what)
        divides = LEAST_EPS <= self.adam_eps < 1
        require(divides, "adam_eps", self.adam_eps, f"{LEAST_EPS:g} or more, and below 1: steps are divided by it")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            require(0 <= value < math.inf, name, value, "0 or more and finite")
        whole = self.learning_rate * self.weight_decay <= 1
        require(whole, "weight_decay", self.weight_decay, "1 / learning_rate or less: a step takes their product off")
        betas = self.adam_betas if isinstance(self.adam_betas, list | tuple) else ()
        decay = len(betas) == 2 and all(isinstance(beta, Real) and 0 <= beta < 1 for beta in betas)
        require(decay, "adam_betas", self.adam_betas, "two numbers in [0, 1)")

    def groups(self, parameters: Iterable[nn.Parameter], learning_rate: float) -> list[dict[str, Any]]:
        """Trained matrices, which decay, and trained vectors, which do not; an adapter may have none of these."""
        trained = [p for p in parameters if p.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
        groups = [
            {"params": matrices, "lr": learning_rate, "weight_decay": self.weight_decay},
            {"params": vectors, "lr": learning_rate, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]  # torch's sharded checkpoints take no empty ones


@dataclass(frozen=True)
class UpdateSettings:
    """How often a rollout is learnt from; the arguments of `OnPolicyModule` say what each means."""

    ppo_epochs: int
    num_minibatches: int
    target_kl: float | None
    entropy_coef: float
    loss_average: LossAverage = "tokens"

    def __post_init__(self) -> None:
        """Refuse counts below 1 and coefficients that are none."""
        require_types(type(self), vars(self))
        require(self.ppo_epochs >= 1, "ppo_epochs", self.ppo_epochs, "1 or more")
        require(self.num_minibatches >= 1, "num_minibatches", self.num_minibatches, "1 or more")
        stops = self.target_kl is None or 0 < self.target_kl < math.inf
        require(stops, "target_kl", self.target_kl, "more than 0 and finite, or null to take every step")
        require(0 <= self.entropy_coef < math.inf, "entropy_coef", self.entropy_coef, "0 or more and finite")


@dataclass(frozen=True)
class SamplingSettings:
    """What the policy samples responses from: its whole distribution at one temperature, which is what is trained."""

    temperature: float
    seed: int
    dynamic_sampling: int = 0

    def __post_init__(self) -> None:
        """Refuse greedy rollouts, which hold nothing to learn from."""
        require_types(type(self), vars(self))
        sampled = 0 < self.temperature < math.inf
        require(sampled, "temperature", self.temperature, "more than 0 (sampled responses are learnt from) and finite")
        require(self.seed >= 0, "seed", self.seed, "0 or more")
        require(self.dynamic_sampling >= 0, "dynamic_sampling", self.dynamic_sampling, "0 (off) or more rounds")

    @property
    def generation(self) -> GenerationSettings:
        """The same as settings of generation; limits and slots are the environment's."""
        return GenerationSettings(temperature=self.temperature, seed=self.seed)


@dataclass(frozen=True)
class DistillationSettings:
    """Who is learnt from, and at which temperature; the arguments of `Distillation` say what each means."""

    teacher: str
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a teacher without a name, and a temperature that leaves no distribution."""
        require_types(type(self), vars(self))
        require(self.teacher != "", "model.teacher", "empty text", "a model's folder, or its name on the hub")
        spread = 0 < self.temperature < math.inf
        require(spread, "temperature", self.temperature, "more than 0 and finite: distributions are compared")


@dataclass(frozen=True)
class CriticSettings:
    """How the critic learns; the arguments of `PPO` say what each means."""

    value_coef: float
    value_clip_range: float | None
    critic_warmup: int
    critic_learning_rate: float | None

    def __post_init__(self) -> None:
        """Refuse coefficients that are none."""
        require_types(type(self), vars(self))
        clips = self.value_clip_range is None or 0 < self.value_clip_range < math.inf
        require(clips, "value_clip_range", self.value_clip_range, "more than 0 and finite, or null for no clipping")
        require(0 <= self.value_coef < math.inf, "value_coef", self.value_coef, "0 or more and finite")
        require(self.critic_warmup >= 0, "critic_warmup", self.critic_warmup, "0 or more")
        rate = self.critic_learning_rate
        require(0 <= (rate or 0) < math.inf, "critic_learning_rate", rate, "0 or more and finite, or null")


@dataclass(frozen=True)
class ReferenceSettings:
    """Which reference a preference loss compares with; the arguments of `DPO` say what each means."""

    reference: str | None
    cache_reference: bool
    reference_free: bool
    moves: bool
    hold_reference: str | None = None

    def __post_init__(self) -> None:
        """Refuse options that leave each other nothing to do."""
        require_types(type(self), vars(self))
        if self.cache_reference and self.reference is not None:
            raise UserError(
                f"cache_reference computes log-probs with the policy before its first step; drop reference "
                f"({self.reference}), or set cache_reference: false"
            )
        if self.reference_free and (self.reference is not None or self.cache_reference):
            raise UserError(
                f"reference_free leaves reference ({self.reference}) and cache_reference ({self.cache_reference}) "
                "nothing to do; drop them, or set reference_free: false"
            )
        if self.hold_reference is not None and (self.reference_free or self.cache_reference or self.moves):
            others = {"reference_free": self.reference_free, "cache_reference": self.cache_reference}
            other = next((name for name, is_set in others.items() if is_set), "reference_update")
            raise UserError(f"hold_reference ({self.hold_reference}) and {other}: drop one, since no reference is held")
        if self.moves and (self.reference_free or self.cache_reference):
            other = "reference_free" if self.reference_free else "cache_reference"
            raise UserError(f"reference_update moves a reference in memory, {other} holds none; set {other}: false")
