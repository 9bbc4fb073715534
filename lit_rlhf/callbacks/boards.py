"""The pages of TensorBoard's Custom Scalars tab: which curves answer a question together."""

import re
from collections.abc import Collection, Mapping

OVER = "over_"  # tags of curves that begin so are drawn over something else than optimiser steps
OTHERS = "further rewards and monitors"  # by names that the user gave
# Page, chart, and the last names of its curves, whatever the stage before the slash.
PAGES: dict[str, dict[str, tuple[str, ...]]] = {
    "Reward and KL": {
        "score": ("score", "shaped_score"),
        OTHERS: (),
        "rewards of steps": ("process", "shaping"),
        "KL to the reference": ("kl",),
        "KL coefficient": ("kl_coef",),
        "accuracy": ("accuracy", "reward_accuracy", "confidence"),
        "margin": ("margin", "reward_margin"),
        "implicit rewards": ("chosen_reward", "rejected_reward"),
        "calibration error": ("calibration_error",),
    },
    "Losses": {
        "loss": ("loss",),
        "policy loss": ("policy_loss",),
        "value loss": ("value_loss",),
        "KL loss": ("kl_loss",),
        "load balancing": (r"\w*load_balancing_loss",),
    },
    "Lengths and ends": {
        "response length": ("response_length", "chosen_length", "rejected_length"),
        "share that ends by itself": ("eos_fraction",),
        "share that repeats": ("repeated_fraction",),
    },
    "Stability": {
        "ratio of new to old policy": ("ratio",),
        "clip fraction": ("clip_fraction",),
        "KL from the rollout's policy": ("approx_kl",),
        "stopped by target_kl": ("stopped",),
        "entropy": ("entropy",),
        "explained variance": ("explained_variance",),
        "log-probs of pairs": ("chosen_logprobs", "rejected_logprobs"),
        "groups without a difference": ("equal_groups", "dropped_groups"),
        "gap of sampler and trainer": ("sampler_gap",),
        "gradient norm": ("grad_norm",),
        "learning rate": ("learning_rate", "critic_learning_rate"),
    },
    "Performance": {
        "tokens per second": ("tokens_per_second",),
        "model FLOPs utilisation": ("mfu",),
        "share of padding": ("padding_fraction",),
        "share of time in rollouts": ("rollout_fraction",),
    },
}
KNOWN = "|".join(name for charts in PAGES.values() for names in charts.values() for name in names)
OF_OTHERS = rf"(rollout|val)/(?!({KNOWN})$)[^/]+$"


def layout(tags: Collection[str]) -> dict[str, dict[str, list[object]]]:
    """The pages for a run of these scalars, as `SummaryWriter.add_custom_scalars` takes them.

    A chart is there if the run has one of its curves. Its patterns are the same in every stage: TensorBoard lays the
    charts of several runs over each other.
    """
    pages: Mapping[str, dict[str, list[str]]] = {
        page: {chart: [rf"(?!{OVER})[^/]+/{name}$" for name in names] or [OF_OTHERS] for chart, names in charts.items()}
        for page, charts in PAGES.items()
    }
    trained = [tag for tag in tags if not tag.startswith("val/")]  # names that the user gave are those of rewards
    kept: dict[str, dict[str, list[object]]] = {
        page: {
            chart: ["Multiline", patterns]
            for chart, patterns in charts.items()
            if any(re.match(pattern, tag) for pattern in patterns for tag in (trained if chart == OTHERS else tags))
        }
        for page, charts in pages.items()
    }
    return {page: charts for page, charts in kept.items() if charts}
