"""Pages of TensorBoard's Custom Scalars tab."""

import re

from lit_rlhf.callbacks.boards import PAGES, layout

DPO = {"train/loss", "val/loss", "dpo/reward_margin", "val/reward_margin", "train/grad_norm", "perf/mfu"}
PPO = {"train/loss", "rollout/score", "val/score", "rollout/gold", "val/gold", "ppo/clip_fraction", "ppo/entropy"}


def charts(tags):
    return {chart: patterns for page in layout(tags).values() for chart, (_, patterns) in page.items()}


def test_a_stage_has_the_charts_of_the_scalars_that_it_logs_and_no_others():
    assert set(charts(DPO)) == {"loss", "margin", "gradient norm", "model FLOPs utilisation"}
    assert set(charts(PPO)) == {"loss", "score", "further rewards and monitors", "clip fraction", "entropy"}
    assert list(layout(DPO)) == ["Reward and KL", "Losses", "Stability", "Performance"]


def test_the_chart_of_a_metric_has_its_curves_of_training_and_of_validation_and_none_else():
    patterns = charts(DPO | PPO)
    found = {chart: {tag for tag in DPO | PPO if any(re.match(p, tag) for p in patterns[chart])} for chart in patterns}
    assert found["loss"] == {"train/loss", "val/loss"}
    assert found["margin"] == {"dpo/reward_margin", "val/reward_margin"}
    assert found["further rewards and monitors"] == {"rollout/gold", "val/gold"}


def test_charts_are_alike_in_every_stage_so_that_tensorboard_lays_them_over_each_other():
    both = charts(DPO).keys() & charts(PPO).keys()
    assert both and all(charts(DPO)[chart] == charts(PPO)[chart] for chart in both)


def test_no_metric_stands_in_two_charts():
    names = [name for charts in PAGES.values() for names in charts.values() for name in names]
    assert len(names) == len(set(names))
