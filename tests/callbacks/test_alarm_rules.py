"""Rules over the curves of a run: each fires on what it is for, since the step at which it began, and not on health."""

import re
from pathlib import Path

import pytest

from lit_rlhf.callbacks.alarm_rules import RULES, Curve, alarms

DOCS = Path(__file__).parents[2] / "docs" / "doctor.md"
RISING = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4]


def curve(*values):
    return Curve([10 * (at + 1) for at in range(len(values))], list(values))


HEALTHY = {
    "rollout/kl": curve(0, 2, 4, 6, 8, 9, 9, 9),
    "rollout/entropy": curve(2.0, 1.8, 1.6, 1.5, 1.5, 1.4),
    "ppo/ratio": curve(1, 1.01, 0.99, 1, 1, 1),
    "ppo/clip_fraction": curve(0, 0.1, 0.1, 0.15, 0.1),
    "ppo/explained_variance": curve(-0.5, -0.1, 0.0, 0.1, 0.3, 0.5),
    "rollout/score": curve(*RISING),
    "rollout/gold": curve(0.0, 0.1, 0.15, 0.3, 0.28, 0.4, 0.38, 0.45),
    "rollout/response_length": curve(20, 21, 22, 21, 23),
    "rollout/eos_fraction": curve(0.4, 0.9, 0.95, 1.0),
    "rollout/repeated_fraction": curve(0.05, 0.04, 0.05),
    "dpo/chosen_logprobs": curve(-50, -51, -49, -52, -53),
    "dpo/reward_margin": curve(0.0, 0.5, 1.0, 1.5),
    "train/learning_rate": curve(1e-5, 5e-6, 1e-6, 0.0),
    "rollout/equal_groups": curve(0.6, 0.3, 0.2, 0.2),
    "perf/padding_fraction": curve(0.1, 0.2, 0.1),
    "rollout/sampler_gap": curve(1e-6, 2e-6, 1e-6),
}
ILL = {  # of each rule: the curves that differ, and since when
    "KL beyond budget": ({"rollout/kl": curve(0, 10, 41, 50, 60, 70)}, 30),
    "entropy collapse": ({"rollout/entropy": curve(2.0, 1.0, 0.3, 0.2, 0.1)}, 30),
    "ratio out of range": ({"ppo/ratio": curve(1, 1.1, 1.3, 1.4, 1.5)}, 30),
    "too much is clipped": ({"ppo/clip_fraction": curve(0.1, 0.5, 0.2, 0.4, 0.4, 0.5)}, 40),
    "critic explains nothing": ({"ppo/explained_variance": curve(-0.2, 0, 0.01, -0.1, 0.0)}, 10),
    "reward hacking": ({"rollout/gold": curve(0.0, 0.3, 0.5, 0.6, 0.5, 0.3, 0.1, -0.1)}, 50),
    "length drift": ({"rollout/response_length": curve(20, 24, 31, 35, 40)}, 30),
    "responses do not end": ({"rollout/eos_fraction": curve(0.9, 0.4, 0.3, 0.1)}, 20),
    "repetition": ({"rollout/repeated_fraction": curve(0.1, 0.4, 0.5, 0.6)}, 20),
    "chosen responses become less likely": ({"dpo/chosen_logprobs": curve(-50, -55, -70, -75, -80)}, 30),
    "margins saturate": ({"dpo/reward_margin": curve(1, 5, 11, 12, 13)}, 30),
    "learning rate is 0": ({"train/learning_rate": curve(1e-5, 0.0, 0.0, 0.0)}, 20),
    "dead groups": ({"rollout/equal_groups": curve(0.2, 0.6, 0.7, 0.8)}, 20),
    "padding": ({"perf/padding_fraction": curve(0.6, 0.6, 0.6)}, 10),
    "sampler and trainer differ": ({"rollout/sampler_gap": curve(0.1, 0.1, 0.1)}, 10),
}


def test_a_healthy_run_raises_no_alarm():
    assert list(alarms(HEALTHY)) == []


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_each_rule_sees_what_it_is_for_and_since_when_and_no_other_does(rule):
    curves, since = ILL[rule]
    (alarm,) = alarms(HEALTHY | curves)
    assert (alarm.rule, alarm.since, alarm.tag) == (rule, since, next(iter(curves)))
    assert alarm.remedy and f"{since}" in str(alarm)


def test_one_outlier_is_no_alarm():
    for curves, _ in ILL.values():
        for tag in curves:
            start = HEALTHY[tag].values
            outlier = [*start[:-2], curves[tag].values[-1], start[-3]]
            assert list(alarms(HEALTHY | {tag: curve(*outlier), "rollout/score": curve(*RISING[:2])})) == [], tag


def test_a_further_reward_that_falls_with_the_score_is_no_hacking():
    falling = curve(*(-value for value in RISING))
    assert list(alarms({"rollout/score": falling, "rollout/gold": falling})) == []


def test_noise_is_no_hacking():
    gold = curve(0.0, 0.5, -0.4, 0.5, -0.5, 0.4, -0.5, 0.3)
    assert list(alarms({"rollout/score": curve(*RISING), "rollout/gold": gold})) == []


def test_short_runs_and_curves_without_points_are_let_be():
    assert list(alarms({"rollout/entropy": curve(2.0, 0.1), "rollout/gold": curve(), "rollout/kl": curve(99)})) == []


def test_the_page_has_each_rule_with_its_threshold_and_what_helps():
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", DOCS.read_text(), re.M)
    assert rows[1:] == [(rule.name, rule.threshold, rule.remedy) for rule in RULES]
