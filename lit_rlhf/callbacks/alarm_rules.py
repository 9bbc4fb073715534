"""What goes wrong in alignment, as rules over the curves of a run; `Alarms` and `lit-rlhf doctor` share them.

A rule looks at the last `RECENT` points together, so that one outlier is no alarm.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev
from typing import NamedTuple

from lit_rlhf.callbacks.boards import OF_OTHERS, OVER

RECENT = 3  # points that a rule looks at together
ENOUGH = 4  # points that a curve needs before it is compared with its beginning


class Curve(NamedTuple):
    """A scalar over time."""

    steps: Sequence[int]
    values: Sequence[float]


Curves = Mapping[str, Curve]


class Seen(NamedTuple):
    """What a rule has found."""

    since: int  # the step
    what: str


class Alarm(NamedTuple):
    """A rule that has found something."""

    rule: str
    tag: str
    since: int
    saw: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.tag} {self.saw}, since step {self.since}. {self.remedy}"


@dataclass(frozen=True)
class Rule:
    """A thing that goes wrong.

    Args:
        name: of the alarm.
        tags: pattern of the curves that it looks at.
        find: what is wrong with such a curve, given all others.
        threshold: in words, for the docs.
        remedy: what people do about it, and by which option.
    """

    name: str
    tags: str
    find: Callable[[Curve, Curves], Seen | None]
    threshold: str
    remedy: str


def beyond(low: float = -float("inf"), high: float = float("inf"), points: int = RECENT) -> Callable:
    """The last points are all outside of [low, high]; since the first of them that has been outside ever since."""

    def find(curve: Curve, curves: Curves) -> Seen | None:
        outside = [not low <= value <= high for value in curve.values]
        if len(outside) < points or not all(outside[-points:]):
            return None
        first = max((at + 1 for at, out in enumerate(outside) if not out), default=0)
        limit = f"above {high:g}" if curve.values[-1] > high else f"below {low:g}"
        return Seen(curve.steps[first], f"is {curve.values[-1]:.3g}, {limit}")

    return find


def drifted(low: float, high: float) -> Callable:
    """The median of the last points is below `low` or above `high` times the first one, which is positive."""

    def find(curve: Curve, curves: Curves) -> Seen | None:
        start = curve.values[0]
        if len(curve.values) < ENOUGH or start <= 0:
            return None
        now = median(curve.values[-RECENT:])
        if low * start <= now <= high * start:
            return None
        first = next(at for at, value in enumerate(curve.values) if not low * start <= value <= high * start)
        return Seen(curve.steps[first], f"went from {start:.3g} to {now:.3g}")

    return find


def fallen(share: float) -> Callable:
    """The median of the last points is more than a share of its size below the first, which is negative."""

    def find(curve: Curve, curves: Curves) -> Seen | None:
        start = curve.values[0]
        limit = start - share * abs(start)
        if len(curve.values) < ENOUGH or median(curve.values[-RECENT:]) >= limit:
            return None
        first = next(at for at, value in enumerate(curve.values) if value < limit)
        return Seen(curve.steps[first], f"fell from {start:.4g} to {median(curve.values[-RECENT:]):.4g}")

    return find


def exploited(share: float) -> Callable:
    """A reward that is not learnt from has fallen by a share of its range, beyond noise, while the one learnt rose."""

    def find(curve: Curve, curves: Curves) -> Seen | None:
        learnt = curves.get(f"{curve_stage(curve, curves)}/score")
        if learnt is None or len(curve.values) < ENOUGH or len(learnt.values) != len(curve.values):
            return None
        smooth, score = means(curve.values), means(learnt.values)
        peak = max(range(len(smooth)), key=smooth.__getitem__)
        fall = smooth[peak] - smooth[-1]
        noise = stdev([b - a for a, b in zip(curve.values, curve.values[1:], strict=False)]) / RECENT**0.5
        if fall <= max(share * (max(smooth) - min(smooth)), noise) or score[-1] <= score[peak]:
            return None
        said = f"fell from {smooth[peak]:.3g} to {smooth[-1]:.3g} while the score rose from {score[peak]:.3g} to"
        return Seen(curve.steps[peak], f"{said} {score[-1]:.3g}")

    return find


def curve_stage(curve: Curve, curves: Curves) -> str:
    """What stands before the slash in a curve's tag."""
    return next(tag.partition("/")[0] for tag, one in curves.items() if one is curve)


def means(values: Sequence[float]) -> list[float]:
    """Each with up to `RECENT` - 1 before it."""
    return [fmean(values[max(at - RECENT + 1, 0) : at + 1]) for at in range(len(values))]


RULES = (
    Rule(
        "KL beyond budget",
        r"(rollout|val)/kl$",
        beyond(high=40.0),
        "above 40 nats per response",
        "Raise model.kl.kl_coef, or let AdaptiveKL do so; lower model.learning_rate or model.ppo_epochs",
    ),
    Rule(
        "entropy collapse",
        r"rollout/entropy$",
        drifted(0.2, float("inf")),
        "below a fifth of its first value",
        "Raise model.entropy_coef or model.kl.kl_coef; lower model.learning_rate",
    ),
    Rule(
        "ratio out of range",
        r"[^/]+/ratio$",
        beyond(0.8, 1.2),
        "mean outside of 0.8 to 1.2",
        "Lower model.ppo_epochs or model.learning_rate; set model.target_kl",
    ),
    Rule(
        "too much is clipped",
        r"[^/]+/clip_fraction$",
        beyond(high=0.3),
        "above 0.3",
        "Lower model.learning_rate or model.ppo_epochs; raise data.rollout_size",
    ),
    Rule(
        "critic explains nothing",
        r"[^/]+/explained_variance$",
        beyond(low=0.05, points=5),
        "below 0.05 in five rollouts",
        "Start model.critic from the reward model; set model.critic_warmup, raise model.critic_learning_rate",
    ),
    Rule(
        "reward hacking",
        OF_OTHERS,
        exploited(0.25),
        "a further reward falls from its best by a quarter of its range, and beyond noise, while the score rises",
        "Raise model.kl.kl_coef; take an earlier checkpoint (ModelCheckpoint with monitor: val/…); mend the reward",
    ),
    Rule(
        "length drift",
        r"(rollout|val)/response_length$",
        drifted(0.5, 1.5),
        "below a half or above one and a half of its first value",
        "Set model.shaping.length_penalty; raise model.kl.kl_coef; see whether the reward likes length",
    ),
    Rule(
        "responses do not end",
        r"(rollout|val)/eos_fraction$",
        beyond(low=0.5),
        "less than half end by themselves",
        "Raise data.max_new_tokens; set model.shaping.missing_end_score; see that SFT learnt end tokens",
    ),
    Rule(
        "repetition",
        r"(rollout|val)/repeated_fraction$",
        beyond(high=0.3),
        "above 0.3 of a response's runs of four tokens have stood in it before",
        "Raise model.kl.kl_coef; add a reward against it by data.rewards; look at samples.html",
    ),
    Rule(
        "chosen responses become less likely",
        r"[^/]+/chosen_logprobs$",
        fallen(0.2),
        "a fifth of its size below the first value",
        "Lower model.learning_rate; raise model.beta; add an SFT term to model.loss",
    ),
    Rule(
        "margins saturate",
        r"(dpo|val)/reward_margin$",
        beyond(high=10.0),
        "above 10",
        "Lower model.learning_rate or trainer.max_epochs; label smoothing or ipo_loss as model.loss",
    ),
    Rule(
        "learning rate is 0",
        r"train/(critic_)?learning_rate$",
        beyond(low=1e-30),
        "0 at three points in a row",
        "Raise trainer.max_steps or max_epochs, by which the schedule ends; see model.warmup_steps",
    ),
    Rule(
        "dead groups",
        r"rollout/equal_groups$",
        beyond(high=0.5),
        "more than half of the groups have one and the same score",
        "Raise data.group_size or model.temperature; take prompts that are neither too easy nor too hard",
    ),
    Rule(
        "padding",
        r"perf/padding_fraction$",
        beyond(high=0.5),
        "above 0.5",
        "Raise data.max_tokens, so that responses of like length find each other",
    ),
    Rule(
        "sampler and trainer differ",
        r"rollout/sampler_gap$",
        beyond(high=0.05),
        "above 0.05 nats per token",
        "trainer.precision: 32-true or bf16-mixed; sample with data.backend: null; see docs/numerics.md",
    ),
)


def alarms(curves: Curves) -> Iterator[Alarm]:
    """What is wrong with a run, by its curves."""
    curves = {tag: curve for tag, curve in curves.items() if not tag.startswith(OVER)}
    for rule in RULES:
        for tag, curve in curves.items():
            if curve.values and re.match(rule.tags, tag) and (seen := rule.find(curve, curves)):
                yield Alarm(rule.name, tag, seen.since, seen.what, rule.remedy)
